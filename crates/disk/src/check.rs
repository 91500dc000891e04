//! Every ext file system of a disk, checked.

use std::sync::Arc;

use qtk_block::{BlockRead, Window};
use qtk_ext4::{CheckOptions, CheckReport};

use crate::{Content, Error, Layout, Place, Slot};

/// A file system that was checked, or could not be.
#[derive(Debug)]
pub struct Checked {
    /// Where it lies.
    pub place: Place,
    /// What it is.
    pub content: Content,
    /// What was found there.
    pub outcome: Result<CheckReport, Error>,
}

/// Checks every ext2, ext3 and ext4 file system of a disk, or the one in the partition asked for, without changing anything.
///
/// # Errors
/// Where there is none, or the partition table cannot be read. What goes wrong with one file system is part of the result.
pub fn check_file_systems(
    device: &Arc<dyn BlockRead>,
    partition: Option<u32>,
    options: &CheckOptions,
) -> Result<Vec<Checked>, Error> {
    let layout = Layout::read(device)?;
    let slots: Vec<&Slot> = match partition {
        Some(number) => vec![layout.partition(number)?],
        None => layout.slots.iter().filter(|slot| slot.probe.content.is_ext()).collect(),
    };
    let foreign = slots.iter().find(|slot| !slot.probe.content.is_ext());
    if let Some(slot) = foreign {
        return Err(Error::NotExt { found: vec![(slot.place, slot.probe.content)] });
    }
    if slots.is_empty() {
        return Err(Error::NotExt { found: Layout::contents(&layout.slots) });
    }
    Ok(slots.into_iter().map(|slot| check_one(device, slot, options)).collect())
}

fn check_one(device: &Arc<dyn BlockRead>, slot: &Slot, options: &CheckOptions) -> Checked {
    let place = slot.place;
    let outcome = Window::new(Arc::clone(device), slot.range.clone())
        .map_err(|source| Error::Io { action: "read", place, source })
        .and_then(|window| qtk_ext4::check(Arc::new(window), options).map_err(|source| Error::Ext4 { place, source }));
    Checked { place, content: slot.probe.content, outcome }
}
