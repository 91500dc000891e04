use qtk_ext4::Timestamp;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::boot::Width;
use super::{Error, Extents, Fat, Handle, Metadata};

/// Bytes per directory slot.
pub(super) const SLOT: u64 = 32;
/// The format's limit for one directory.
const MAX_SLOTS: u64 = 1 << 16;
const DIRECTORY: u8 = 0x10;
const VOLUME_LABEL: u8 = 0x08;
const READ_ONLY: u8 = 0x01;
const LONG_NAME: u8 = 0x0f;
const LAST_LONG_SLOT: u8 = 0x40;
const UNITS_PER_SLOT: usize = 13;
const MAX_LONG_SLOTS: u8 = 20;
/// The upper half of code page 437, which short names are written in.
const CODE_PAGE_437: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The long name where there is one, else the short one.
    pub name: String,
    /// The 8.3 name.
    pub short_name: String,
    /// The file.
    pub handle: Handle,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// A slot of a directory: a short entry, a label, or a part of a long name.
#[derive(Clone, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawEntry {
    name: [u8; 11],
    attributes: u8,
    case: u8,
    created: [u8; 7],
    cluster_high: U16,
    time: U16,
    date: U16,
    cluster_low: U16,
    size: U32,
}
const _: () = assert!(size_of::<RawEntry>() as u64 == SLOT);

impl RawEntry {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.as_mut_bytes()
    }

    fn is_end(&self) -> bool {
        self.name[0] == 0
    }

    fn is_deleted(&self) -> bool {
        self.name[0] == 0xe5
    }

    fn is_long_name(&self) -> bool {
        self.attributes & 0x3f == LONG_NAME
    }

    pub(super) fn is_label(&self) -> bool {
        !self.is_long_name() && self.attributes & VOLUME_LABEL != 0
    }

    pub(super) fn label(&self) -> Vec<u8> {
        self.name.trim_ascii_end().to_vec()
    }

    pub(super) fn first_cluster(&self, width: Width) -> u32 {
        let high = if width == Width::Fat32 { u32::from(self.cluster_high.get()) << 16 } else { 0 };
        high | u32::from(self.cluster_low.get())
    }

    pub(super) fn metadata(&self) -> Metadata {
        let is_dir = self.attributes & DIRECTORY != 0;
        Metadata {
            is_dir,
            read_only: self.attributes & READ_ONLY != 0,
            size: if is_dir { 0 } else { self.size.get().into() },
            modified: timestamp(self.date.get(), self.time.get()),
        }
    }

    fn short_name(&self) -> String {
        let (base, extension) = self.name.split_at(8);
        let mut base = base.to_vec();
        if base.first() == Some(&0x05) {
            base[0] = 0xe5;
        }
        let mut name = from_code_page(base.trim_ascii_end(), self.case & 0x08 != 0);
        if !extension.trim_ascii_end().is_empty() {
            name.push('.');
            name.push_str(&from_code_page(extension.trim_ascii_end(), self.case & 0x10 != 0));
        }
        name
    }

    /// The checksum that ties long-name slots to this short entry.
    fn checksum(&self) -> u8 {
        self.name.iter().fold(0_u8, |sum, &byte| sum.rotate_right(1).wrapping_add(byte))
    }

    /// The UTF-16 units of a long-name slot, and its checksum.
    fn long_name_part(&self) -> ([u16; UNITS_PER_SLOT], u8) {
        let bytes = self.as_bytes();
        let fields = [bytes.get(1..11), bytes.get(14..26), bytes.get(28..32)];
        let mut units = [0; UNITS_PER_SLOT];
        let pairs = fields.into_iter().flatten().flat_map(|field| field.as_chunks::<2>().0);
        for (unit, &pair) in units.iter_mut().zip(pairs) {
            *unit = u16::from_le_bytes(pair);
        }
        (units, bytes.get(13).copied().unwrap_or_default())
    }
}

fn from_code_page(bytes: &[u8], lower: bool) -> String {
    let decode = |&byte: &u8| match byte.checked_sub(0x80) {
        Some(index) => CODE_PAGE_437.chars().nth(index.into()).unwrap_or(char::REPLACEMENT_CHARACTER),
        None => char::from(byte),
    };
    bytes.iter().map(decode).map(|char| if lower { char.to_ascii_lowercase() } else { char }).collect()
}

/// A DOS date and time, which has no time zone, as if it were UTC.
fn timestamp(date: u16, time: u16) -> Timestamp {
    let (year, month, day) =
        (i64::from(date >> 9), i64::from(date >> 5 & 0xf).clamp(1, 12), i64::from(date & 0x1f).max(1));
    // Days since 1970 of the first of March of the era's year: the year starts in March so that leap days come last.
    let year = if month > 2 { year.saturating_add(1980) } else { year.saturating_add(1979) };
    let month = (month.saturating_add(9)) % 12;
    let day_of_year = month.saturating_mul(153).saturating_add(2) / 5;
    let leap_days = (year / 4).saturating_sub(year / 100).saturating_add(year / 400);
    let days = [year.saturating_mul(365), leap_days, day_of_year, day, -719_469].into_iter().sum::<i64>();
    let seconds = [
        i64::from(time >> 11).saturating_mul(3600),
        i64::from(time >> 5 & 0x3f).saturating_mul(60),
        i64::from(time & 0x1f).saturating_mul(2),
    ];
    Timestamp { seconds: days.saturating_mul(86_400).saturating_add(seconds.into_iter().sum()), nanos: 0 }
}

/// A walk over a directory's slots.
pub(super) struct Slots<'a> {
    fat: &'a Fat,
    extents: Extents,
    buffer: Vec<u8>,
    /// Byte offset on the volume of the buffer, and of the next slot in it.
    buffer_at: u64,
    next: usize,
    left: u64,
}

impl<'a> Slots<'a> {
    pub(super) fn new(fat: &'a Fat, extents: Extents) -> Self {
        Self { fat, extents, buffer: Vec::new(), buffer_at: 0, next: 0, left: MAX_SLOTS }
    }

    /// The next slot in use, whatever it is.
    pub(super) fn next_raw(&mut self) -> Result<Option<(Handle, RawEntry)>, Error> {
        loop {
            if let Some(Ok((entry, _))) = self.buffer.get(self.next..).map(RawEntry::read_from_prefix) {
                let handle = Handle(self.buffer_at.saturating_add(self.next as u64));
                self.next = self.next.saturating_add(size_of::<RawEntry>());
                let endless = Error::Corrupt { offset: handle.0, problem: "a directory does not end" };
                self.left = self.left.checked_sub(1).ok_or(endless)?;
                if entry.is_end() {
                    return Ok(None);
                }
                if !entry.is_deleted() {
                    return Ok(Some((handle, entry)));
                }
                continue;
            }
            let Some(extent) = self.extents.next(self.fat)? else { return Ok(None) };
            // A run of clusters or a root directory: 2 MiB at most.
            let len = usize::try_from(extent.end.saturating_sub(extent.start)).unwrap_or(0);
            self.buffer.resize(len, 0);
            self.fat.read_device(&mut self.buffer, extent.start)?;
            (self.buffer_at, self.next) = (extent.start, 0);
        }
    }

    /// The next file or directory, other than `.` and `..`.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut long = LongName::default();
        while let Some((handle, entry)) = self.next_raw()? {
            if entry.is_long_name() {
                long.add(&entry);
            } else if entry.is_label() || matches!(entry.short_name().as_str(), "." | "..") {
                long = LongName::default();
            } else {
                let short_name = entry.short_name();
                let name = long.finish(entry.checksum()).unwrap_or_else(|| short_name.clone());
                return Ok(Some(Entry { name, short_name, handle, is_dir: entry.metadata().is_dir }));
            }
        }
        Ok(None)
    }
}

/// Parts of a long name, which come last part first.
#[derive(Default)]
struct LongName {
    parts: Vec<[u16; UNITS_PER_SLOT]>,
    missing: u8,
    checksum: u8,
}

impl LongName {
    fn add(&mut self, entry: &RawEntry) {
        let order = entry.name[0];
        let number = order & !LAST_LONG_SLOT;
        let (units, checksum) = entry.long_name_part();
        if order & LAST_LONG_SLOT != 0 && (1..=MAX_LONG_SLOTS).contains(&number) {
            *self = Self { parts: Vec::new(), missing: number, checksum };
        }
        if number == 0 || number != self.missing || checksum != self.checksum {
            *self = Self::default();
            return;
        }
        self.parts.push(units);
        self.missing = number.saturating_sub(1);
    }

    /// The name, if it is complete and belongs to the short entry of that checksum.
    fn finish(&mut self, checksum: u8) -> Option<String> {
        let this = std::mem::take(self);
        if this.parts.is_empty() || this.missing != 0 || this.checksum != checksum {
            return None;
        }
        let units: Vec<u16> = this.parts.iter().rev().flatten().copied().take_while(|&unit| unit != 0).collect();
        Some(String::from_utf16_lossy(&units))
    }
}
