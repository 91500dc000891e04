//! Header extensions (specification, "Header extensions").

use crate::error::{Corruption, Place};
use crate::features::{FeatureKind, NAMES};
use crate::types::in_memory;

/// Magic number of the backing format extension.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Magic number of the feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Magic number of the bitmaps extension.
pub const BITMAPS: u32 = 0x2385_2875;
/// Magic number of the name of the external data file.
pub const EXTERNAL_DATA_FILE: u32 = 0x4441_5441;
/// Magic number of the pointer to the LUKS header.
pub const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;

/// Magic number of an extension that only skips a part of the header, while a header is being replaced.
pub(crate) const SKIP: u32 = 0x534b_4950;

const FEATURE_NAME_LEN: usize = 48;

/// A header extension, its data as stored: what this crate does not know is kept verbatim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its kind, such as [`BACKING_FORMAT`].
    pub magic: u32,
    /// Where its data begins in the header, in bytes.
    pub offset: u64,
    /// Its data without padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// An extension for a header that is yet to be encoded.
    #[must_use]
    pub fn new(magic: u32, data: Vec<u8>) -> Self {
        Self { magic, offset: 0, data }
    }

    /// The names of all feature bits of the specification.
    #[must_use]
    pub fn feature_names() -> Self {
        let mut data = vec![0; NAMES.len() * FEATURE_NAME_LEN];
        for ((kind, bit, name), entry) in NAMES.iter().zip(data.chunks_exact_mut(FEATURE_NAME_LEN)) {
            entry[0] = *kind as u8;
            entry[1] = *bit;
            entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        }
        Self::new(FEATURE_NAMES, data)
    }

    /// The name that a feature name table gives a bit.
    pub(crate) fn feature_name(&self, kind: FeatureKind, bit: u32) -> Option<String> {
        let (entries, _) = self.data.as_chunks::<FEATURE_NAME_LEN>();
        let entry = entries.iter().find(|entry| entry[0] == kind as u8 && u32::from(entry[1]) == bit)?;
        let name = entry[2..].split(|&byte| byte == 0).next()?;
        (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
    }

    /// The extensions in `area`, which begins `start` bytes into the file and ends before the backing file's name.
    pub(crate) fn parse_all(area: &[u8], start: u64) -> Result<Vec<Self>, Corruption> {
        let mut extensions = Vec::new();
        let mut at = 0;
        while let Some((head, rest)) = area.get(at..).and_then(|rest| rest.split_first_chunk::<8>()) {
            let [m0, m1, m2, m3, l0, l1, l2, l3] = *head;
            let magic = u32::from_be_bytes([m0, m1, m2, m3]);
            if magic == 0 {
                break;
            }
            let len = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
            let data = rest.get(..in_memory(len)).ok_or(Corruption::OutOfBounds {
                place: Place::Extension(magic),
                field: "length",
                value: len,
                allowed: 0..=rest.len() as u64,
            })?;
            extensions.push(Self { magic, offset: start + (at + 8) as u64, data: data.to_vec() });
            at += 8 + data.len().next_multiple_of(8);
        }
        Ok(extensions)
    }

    /// Its place among a header's extensions: QEMU's order, what it does not know at the end.
    pub(crate) fn rank(&self) -> usize {
        const ORDER: [u32; 5] = [BACKING_FORMAT, EXTERNAL_DATA_FILE, FULL_DISK_ENCRYPTION, FEATURE_NAMES, BITMAPS];
        ORDER.iter().position(|&magic| magic == self.magic).unwrap_or(ORDER.len())
    }

    /// Appends the extension as it is stored.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.magic.to_be_bytes());
        out.extend(u32::try_from(self.data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(&self.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Extensions as they are to be stored: in QEMU's order, and without what only served to replace a header.
pub(crate) fn in_order(extensions: &[Extension]) -> Vec<Extension> {
    let mut ordered: Vec<_> = extensions.iter().filter(|extension| extension.magic != SKIP).cloned().collect();
    ordered.sort_by_key(Extension::rank);
    ordered
}

/// Content of the bitmaps extension (specification, "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Entries of the bitmap directory.
    pub count: u32,
    /// Size of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Where the bitmap directory begins in the file.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    /// Bytes of the extension's data.
    pub(crate) const LEN: usize = 24;

    /// The extension's data.
    pub(crate) fn encode(self) -> [u8; Self::LEN] {
        let mut data = [0; Self::LEN];
        data[..4].copy_from_slice(&self.count.to_be_bytes());
        data[8..16].copy_from_slice(&self.directory_size.to_be_bytes());
        data[16..].copy_from_slice(&self.directory_offset.to_be_bytes());
        data
    }

    pub(crate) fn decode(data: &[u8]) -> Result<Self, Corruption> {
        let malformed = |problem| Corruption::Malformed { place: Place::Extension(BITMAPS), problem };
        let data: &[u8; Self::LEN] = data.try_into().map_err(|_| malformed("its length is not 24 bytes"))?;
        let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| data[at + i]));
        // The upper half is the count, the lower one reserved.
        let count = u32::try_from(word(0) >> 32).map_err(|_| malformed("its count is too large"))?;
        Ok(Self { count, directory_size: word(8), directory_offset: word(16) })
    }
}
