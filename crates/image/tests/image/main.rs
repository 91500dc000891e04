//! Images as users have them, against QEMU's tools as judges.
#![cfg(test)]

mod common;
mod compare;
mod convert;
mod dd;
mod describe;
mod edits;
mod flatten;
mod full_disk;
mod locks;
mod measure;
mod names;
mod once;
mod open;
mod random_chains;
mod salvage;
mod unused;
