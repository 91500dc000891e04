use crate::error::{Corruption, Error, Place};
use crate::extension::BitmapsExtension;
use crate::file::ImageFile;
use crate::header::Header;
use crate::snapshot::Entry;
use crate::types::{HostOffset, in_memory};

const FIXED: usize = 24;
const FLAGS_AT: usize = 12;
const FLAG_IN_USE: u32 = 1;
const FLAG_AUTO: u32 = 2;
const MAX_TABLE_ENTRIES: u64 = 8 << 20;

/// A persistent dirty bitmap, as its entry in the bitmap directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Whether it does not reflect all writes: somebody stopped while using it, or did not know it.
    pub in_use: bool,
    /// Whether QEMU records writes in it as soon as it opens the image.
    pub auto: bool,
    /// Where its table begins.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_size: u32,
}

/// The bitmap directory, decoded and as stored.
#[derive(Debug)]
pub(crate) struct BitmapDirectory {
    pub(crate) extension: BitmapsExtension,
    pub(crate) bitmaps: Vec<Bitmap>,
    bytes: Vec<u8>,
    entries_at: Vec<usize>,
}

impl BitmapDirectory {
    /// The directory, if the image has consistent bitmaps.
    pub(crate) fn read(file: &ImageFile, header: &Header) -> Result<Option<Self>, Error> {
        let Some(extension) = header.bitmaps().map_err(|what| file.corrupt(what))? else {
            return Ok(None);
        };
        let place = Place::BitmapDirectory;
        let offset = HostOffset(extension.directory_offset);
        if header.cluster_bits.offset_within(offset.0) != 0 {
            return Err(file.corrupt(Corruption::Misaligned { place, offset }));
        }
        let bytes = file.read_structure(place, offset, extension.directory_size)?;
        let mut directory = Self { extension, bitmaps: Vec::new(), bytes, entries_at: Vec::new() };
        directory.parse().map_err(|problem| file.corrupt(Corruption::Malformed { place, problem }))?;
        Ok(Some(directory))
    }

    fn parse(&mut self) -> Result<(), &'static str> {
        let mut at = 0;
        for _ in 0..self.extension.count {
            let rest = self.bytes.get(at..).filter(|rest| rest.len() >= FIXED).ok_or("it ends inside an entry")?;
            let entry = Entry(rest);
            let name_at = FIXED.saturating_add(in_memory(entry.u32(20).into()));
            let end = name_at.saturating_add(entry.u16(18).into());
            let name = rest.get(name_at..end).ok_or("it ends inside an entry")?;
            let [_, granularity_bits] = entry.u16(16).to_be_bytes();
            if granularity_bits > 31 {
                return Err("a bitmap's granularity is too large");
            }
            if u64::from(entry.u32(8)) > MAX_TABLE_ENTRIES {
                return Err("a bitmap's table is too large");
            }
            self.bitmaps.push(Bitmap {
                name: String::from_utf8_lossy(name).into_owned(),
                granularity: 1 << granularity_bits,
                in_use: entry.u32(FLAGS_AT) & FLAG_IN_USE != 0,
                auto: entry.u32(FLAGS_AT) & FLAG_AUTO != 0,
                table: HostOffset(entry.u64(0)),
                table_size: entry.u32(8),
            });
            self.entries_at.push(at);
            at = at.saturating_add(end.next_multiple_of(8));
        }
        if at == self.bytes.len() { Ok(()) } else { Err("its length is not that of its entries") }
    }

    /// The directory as stored, with every bitmap marked as no longer following the disk.
    pub(crate) fn bytes_in_use(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for at in &self.entries_at {
            if let Some(flags) = bytes.get_mut(at + FLAGS_AT + 3) {
                *flags |= FLAG_IN_USE.to_be_bytes()[3];
            }
        }
        bytes
    }
}
