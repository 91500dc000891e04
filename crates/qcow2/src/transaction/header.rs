use crate::error::{Error, WriteObstacle};
use crate::extension::{self, Extension};
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{HostOffset, in_memory};

/// What disks write whole: a header changes in the one write of its first sector.
const SECTOR: usize = 512;
const V2_LEN: usize = 72;
const BACKING_NAME: std::ops::Range<usize> = 8..20;
const HEADER_LENGTH: std::ops::Range<usize> = 100..104;

/// The first cluster of an image as some commit left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderArea(Vec<u8>);

impl HeaderArea {
    pub(crate) fn read(file: &ImageFile, header: &Header) -> Result<Self, Error> {
        let mut bytes = vec![0; header.cluster_bits.buffer_len()];
        file.read_padded(&mut bytes, HostOffset(0))?;
        Ok(Self(bytes))
    }

    /// Whether the file still begins with this header.
    pub(crate) fn is_current(&self, file: &ImageFile) -> Result<bool, Error> {
        let mut sector = [0; SECTOR];
        file.read_padded(&mut sector, HostOffset(0))?;
        Ok(self.0.starts_with(&sector))
    }

    /// The area with `new` as its header, laid out as QEMU does.
    fn with(&self, file: &ImageFile, old: &Header, new: &Header) -> Result<Self, Error> {
        let new = Header { extensions: extension::in_order(&new.extensions), ..new.clone() };
        let mut bytes = new.encode().ok_or_else(|| refused(file, WriteObstacle::HeaderFull))?;
        if (old.version, &old.extensions, &old.backing_name) != (new.version, &new.extensions, &new.backing_name) {
            bytes.resize(self.0.len(), 0);
            return Ok(Self(bytes));
        }
        // Only numbers change: whatever wrote the rest, it stays where it is.
        bytes.truncate(self.fixed_len());
        for range in [BACKING_NAME, HEADER_LENGTH] {
            if let Some(field) = bytes.get_mut(range.clone()) {
                field.copy_from_slice(&self.0[range]);
            }
        }
        bytes.extend(&self.0[bytes.len()..]);
        Ok(Self(bytes))
    }

    fn word(&self, at: usize) -> usize {
        let bytes = self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, |bytes| in_memory(u32::from_be_bytes(bytes).into()))
    }

    /// Length of the part before the extensions.
    fn fixed_len(&self) -> usize {
        let len = if self.word(4) == 2 { V2_LEN } else { self.word(HEADER_LENGTH.start) };
        len.min(self.0.len())
    }

    /// Everything up to the end of the extensions and of the backing file's name.
    fn used(&self) -> &[u8] {
        // The cluster's size bounds both.
        let (name, name_len) = (self.word(BACKING_NAME.start + 4), self.word(BACKING_NAME.start + 8));
        let fixed = self.fixed_len();
        let extensions_end = if name == 0 { self.0.len() } else { name.min(self.0.len()) };
        let extensions = self.0.get(fixed..extensions_end).unwrap_or_default();
        let extensions = Extension::parse_all(extensions, fixed as u64).unwrap_or_default();
        let last = extensions.last().map_or(fixed, |last| in_memory(last.offset) + last.data.len().next_multiple_of(8));
        let end_marker = (last + 8).min(extensions_end);
        &self.0[..end_marker.max(name.saturating_add(name_len)).min(self.0.len())]
    }

    fn beyond_first_sector(&self) -> &[u8] {
        self.used().get(SECTOR..).unwrap_or_default()
    }

    fn write_first_sector(&self, file: &ImageFile) -> Result<(), Error> {
        file.write(&self.0[..SECTOR], HostOffset(0))?;
        file.sync()
    }

    /// Writes what lies past the first sector, up to `end`.
    fn write_beyond(&self, file: &ImageFile, end: usize) -> Result<(), Error> {
        match self.0.get(SECTOR..end) {
            Some(bytes) if !bytes.is_empty() => file.write(bytes, HostOffset(SECTOR as u64)),
            _ => Ok(()),
        }
    }
}

/// Replaces the header of an image, `old` with the area `committed`, by `new`; a crash leaves one of the two.
///
/// Whatever `new` refers to must be on stable storage. Where extensions or names past the first sector change, the new
/// ones are first reached in an unused part of the cluster: the first sector then begins with an extension that skips what
/// lies between, which readers ignore. A second write brings everything to its usual place. Returns the new area.
pub(crate) fn replace_header(
    file: &ImageFile,
    committed: &HeaderArea,
    old: &Header,
    new: &Header,
) -> Result<HeaderArea, Error> {
    let area = committed.with(file, old, new)?;
    if area == *committed {
        return Ok(area);
    }
    let (before, after) = (committed.beyond_first_sector(), area.beyond_first_sector());
    if after == before {
        area.write_first_sector(file)?;
    } else if after.starts_with(before) {
        // Nothing refers to what follows yet.
        area.write_beyond(file, area.used().len())?;
        file.sync()?;
        area.write_first_sector(file)?;
    } else if before.starts_with(after) {
        area.write_first_sector(file)?;
        area.write_beyond(file, committed.used().len())?;
    } else {
        let detour = detour(committed, &area).ok_or_else(|| refused(file, WriteObstacle::HeaderOutOfReach))?;
        detour.write_beyond(file, detour.used().len())?;
        file.sync()?;
        detour.write_first_sector(file)?;
        area.write_beyond(file, area.used().len())?;
        file.sync()?;
        area.write_first_sector(file)?;
        area.write_beyond(file, detour.used().len())?;
    }
    Ok(area)
}

fn refused(file: &ImageFile, obstacle: WriteObstacle) -> Error {
    Error::NotWritable { image: file.name.to_string(), obstacle }
}

/// `area` with its extensions and names where neither it nor `committed` has any, and `committed`'s left as they are.
fn detour(committed: &HeaderArea, area: &HeaderArea) -> Option<HeaderArea> {
    let (fixed, variable) = area.used().split_at_checked(area.fixed_len())?;
    let free = committed.used().len().max(area.used().len()).max(SECTOR).next_multiple_of(SECTOR);
    let skip_data = fixed.len() + 8;
    let skipped = u32::try_from(free.checked_sub(skip_data)?).ok()?;
    let mut bytes = committed.0.clone();
    let mut put = |at: usize, part: &[u8]| {
        bytes.get_mut(at..at.checked_add(part.len())?)?.copy_from_slice(part);
        Some(())
    };
    put(0, &[0; SECTOR])?;
    put(0, fixed)?;
    put(fixed.len(), &extension::SKIP.to_be_bytes())?;
    put(fixed.len() + 4, &skipped.to_be_bytes())?;
    put(free, variable)?;
    let name = area.word(BACKING_NAME.start + 4);
    if name != 0 {
        put(BACKING_NAME.start, &((name - fixed.len() + free) as u64).to_be_bytes())?;
    }
    Some(HeaderArea(bytes))
}
