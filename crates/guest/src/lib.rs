//! What is done to a guest's files: put in, taken out, listed, changed. Operations on a [`Tree`](qtk_disk::Tree), one per verb.
//!
//! Nothing reaches the disk before [`Tree::commit`](qtk_disk::Tree::commit), except file content on its way to blocks that
//! nothing refers to yet. After an error the tree holds half an operation: drop it, and the transaction beneath it.

mod chown;
mod copy;
mod error;
pub mod extract;
mod files;
pub mod inject;
mod list;
mod mode;
pub mod populate;
mod users;
mod walk;
mod xattr;

pub use chown::{ChownOptions, chmod, chown};
pub use error::{Error, Result};
pub use files::{
    LinkOptions, MkdirOptions, RemoveOptions, WriteOptions, cat, link, make_directories, move_files, remove, write,
};
pub use list::{Entry, Listing, list, stat};
pub use mode::Mode;
pub use users::{Accounts, Owner, OwnerIds};
