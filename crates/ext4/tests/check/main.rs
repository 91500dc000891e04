//! The checker against e2fsck: on everything that mke2fs and the kernel make, and on damage of every kind.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "../support/mod.rs"]
mod support;

mod clean;
mod corpus;
mod damage;
mod journal;
mod layout;
mod refuse;
