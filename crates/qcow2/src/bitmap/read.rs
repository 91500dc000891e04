use super::{Bitmap, BitmapContents, BitmapRefusal};
use crate::error::{Corruption, Error, Place};
use crate::file::ImageFile;
use crate::types::{ClusterBits, HostOffset};

const ALL_ONES: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What an entry of a bitmap's table says about a cluster of its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableEntry {
    AllZeroes,
    AllOnes,
    Stored(HostOffset),
}

impl TableEntry {
    /// `None` for an entry with reserved bits.
    pub(crate) fn decode(word: u64) -> Option<Self> {
        match word {
            0 => Some(Self::AllZeroes),
            ALL_ONES => Some(Self::AllOnes),
            _ => (word & !OFFSET == 0).then_some(Self::Stored(HostOffset(word))),
        }
    }
}

/// The table of a bitmap.
pub(super) fn read_table(file: &ImageFile, bits: ClusterBits, bitmap: &Bitmap) -> Result<Vec<TableEntry>, Error> {
    let corrupt = |problem| file.corrupt(Corruption::Bitmap { name: bitmap.name.clone(), problem });
    let words = file.read_table(Place::BitmapDirectory, bitmap.table, bitmap.table_size.into())?;
    let decode = |word| match TableEntry::decode(word) {
        None => Err(corrupt("its table has reserved bits set")),
        Some(TableEntry::Stored(offset)) if bits.offset_within(offset.0) != 0 => {
            Err(corrupt("its table points into the middle of a cluster"))
        }
        Some(entry) => Ok(entry),
    };
    words.into_iter().map(decode).collect()
}

/// The bits of a bitmap of a disk of `disk_size` bytes. It must be consistent.
pub(crate) fn read_contents(
    file: &ImageFile,
    bits: ClusterBits,
    disk_size: u64,
    bitmap: &Bitmap,
) -> Result<BitmapContents, Error> {
    if bitmap.in_use {
        return Err(refused(file, &bitmap.name, BitmapRefusal::Inconsistent));
    }
    let mut contents = BitmapContents::new(disk_size, bitmap.granularity, bits.buffer_len());
    if u64::from(bitmap.table_size) != contents.page_count() {
        let problem = "its table does not have the size that the disk's size asks for";
        return Err(file.corrupt(Corruption::Bitmap { name: bitmap.name.clone(), problem }));
    }
    let table = read_table(file, bits, bitmap)?;
    let stored = table.iter().filter(|entry| matches!(entry, TableEntry::Stored(_))).count() as u64;
    if stored > bits.clusters_for(file.storage.size()) {
        let problem = "its table refers to more clusters than the file has";
        return Err(file.corrupt(Corruption::Bitmap { name: bitmap.name.clone(), problem }));
    }
    for (index, entry) in (0..).zip(table) {
        match entry {
            TableEntry::AllZeroes => {}
            TableEntry::AllOnes => contents.load_page(index, None),
            TableEntry::Stored(offset) => {
                let bytes = file.read_structure(Place::BitmapDirectory, offset, bits.size())?;
                contents.load_page(index, Some(bytes));
            }
        }
    }
    contents.trim();
    Ok(contents)
}

pub(crate) fn refused(file: &ImageFile, bitmap: &str, refusal: BitmapRefusal) -> Error {
    Error::Bitmap { image: file.name.to_string(), bitmap: bitmap.to_owned(), refusal }
}
