//! Disk images as users name them: a path, a format, a chain of backing files, a lock.
//!
//! [`Image::open`] opens a whole chain and shows it as one [`BlockRead`](qtk_block::BlockRead) device;
//! [`Image::begin`] starts a [`Transaction`], in which every change happens or does not, whatever kills the process.
//! [`flatten`] merges a chain into one file, [`compare`] tells whether two devices hold the same, [`info`] and [`map`] say
//! what `qemu-img` would say about an image.

mod bench;
mod build;
mod chain;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod edit;
mod error;
mod flatten;
mod format;
mod image;
mod info;
mod layer;
mod map;
mod measure;
mod name;
mod node;
mod open;
mod pipeline;
mod rate;
mod rebase;
mod redo;
mod resize;
mod salvage;
mod snapshot_name;
mod spec;
mod status;
mod storage;
mod transaction;

pub use bench::{BenchOptions, bench};
pub use build::build_image;
pub use chain::{Chain, Run, Runs};
pub use commit::{CommitOptions, commit};
pub use compare::{Comparison, compare};
pub use convert::{BitmapCopy, ConvertOptions, ConvertReport, ConvertWarning, JoinedDisk, Target, convert};
pub use create::{NewImage, create_image, open_base};
pub use dd::{DdOptions, DdReport, dd};
pub use edit::{edit, edit_alone, edit_open};
pub use error::Error;
pub use flatten::{FlattenOptions, flatten};
pub use format::Format;
pub use image::Image;
pub use info::{ImageInfo, LocalTime, Qcow2Info, chain_info, human_size, info, node_info, snapshot_table};
pub use layer::ChainLayer;
pub use map::{MapEntry, map};
pub use measure::{MeasureSource, Measurement, measure};
pub use open::{BackingPolicy, OpenOptions, Warning};
pub use rate::RateLimit;
pub use rebase::{RebaseMode, RebaseOptions, rebase};
pub use resize::{NewSize, ResizeOptions, Resized, resize, resize_open};
pub use salvage::{Salvage, salvage};
pub use snapshot_name::SnapshotName;
pub use spec::{NodeSpec, OptionValue, SpecError};
pub use transaction::Transaction;
