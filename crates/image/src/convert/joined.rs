use std::io;

use qtk_block::{BlockRead, ImageLock};

use super::{Disk, hold_still};
use crate::{Error, Image};

/// The disk that [`convert`](crate::convert) copies, for a look at it before that. While it is there nobody can write to the
/// sources, unless they were opened to be shared.
#[derive(Debug)]
pub struct JoinedDisk {
    disk: Disk,
    _held: Vec<Option<ImageLock>>,
}

impl JoinedDisk {
    /// The disks of `sources`, one after the other.
    pub fn new(sources: &[Image]) -> Result<Self, Error> {
        Ok(Self { _held: hold_still(sources)?, disk: Disk::new(sources, false) })
    }
}

impl BlockRead for JoinedDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }
}
