use super::{Bitmap, BitmapContents};
use crate::error::Error;
use crate::transaction::Transaction;

/// A bitmap to add to an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name: 1 to 1023 bytes that no other bitmap of the image has.
    pub name: String,
    /// Bytes of the disk that one bit stands for, a power of two from 512 to 2 GiB; by default the cluster size, but at least
    /// 4 KiB and at most 64 KiB.
    pub granularity: Option<u64>,
    /// Whether writes are recorded in it from now on.
    pub enabled: bool,
}

/// Persistent dirty bitmaps. Enabled ones have recorded the transaction's own writes when it commits.
impl Transaction {
    /// The bitmaps as the transaction has them, in the directory's order. Places in the file are known after the commit.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<Bitmap> {
        self.view(|state| state.bitmaps.list().cloned().collect())
    }

    /// The bits of a consistent bitmap as the transaction has them.
    pub fn bitmap_contents(&self, name: &str) -> Result<BitmapContents, Error> {
        self.view(|state| state.bitmap_contents(name))
    }

    /// Adds a bitmap without a set bit.
    pub fn add_bitmap(&self, new: &NewBitmap) -> Result<(), Error> {
        self.change(|state| state.add_bitmap(new))
    }

    /// Removes a bitmap, which may be inconsistent.
    pub fn remove_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change(|state| state.remove_bitmap(name))
    }

    /// Clears all bits of a bitmap.
    pub fn clear_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change(|state| state.change_bits(name, BitmapContents::clear))
    }

    /// Lets a bitmap record writes from now on.
    pub fn enable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change(|state| state.enable_bitmap(name, true))
    }

    /// Lets a bitmap keep its bits as they are from now on.
    pub fn disable_bitmap(&self, name: &str) -> Result<(), Error> {
        self.change(|state| state.enable_bitmap(name, false))
    }

    /// Sets the bits of all that `source`, a bitmap of this or another image, calls dirty. Granularities may differ, the
    /// sizes of the disks may not.
    pub fn merge_bitmap(&self, name: &str, source: &BitmapContents) -> Result<(), Error> {
        self.change(|state| state.merge_bitmap(name, source))
    }
}
