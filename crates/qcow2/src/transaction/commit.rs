use std::ops::Range;

use super::refcounts::NewRefcountTable;
use super::state::{PendingTable, State};
use crate::bitmap::BitmapDirectory;
use crate::entry::{L1Entry, L2Entry};
use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::extension::{self, BitmapsExtension};
use crate::features;
use crate::file::{ImageFile, table_bytes};
use crate::header::{Header, patch};
use crate::mapping::L2Tables;
use crate::types::{HostCluster, HostOffset, Version, in_memory};

/// The first sector of an image, the one write that makes a commit happen.
pub(super) type Sector = [u8; patch::SECTOR];

pub(super) fn read_sector(file: &ImageFile) -> Result<Sector, Error> {
    let mut sector = [0; patch::SECTOR];
    file.read_padded(&mut sector, HostOffset(0))?;
    Ok(sector)
}

impl State {
    /// Writes all pending metadata to free clusters and returns the header's sector that refers to it.
    pub(super) fn write_metadata(
        &mut self,
        bitmaps: Option<&BitmapDirectory>,
        committed: &Sector,
    ) -> Result<Sector, Error> {
        let mut sector = Patch(*committed);
        if let Some(bitmaps) = bitmaps {
            let directory = self.write_bitmap_directory(bitmaps)?;
            if let Some((base, at)) = bitmap_directory_field(self.header(), committed) {
                sector = Patch(base);
                sector.put(at, &directory.0.to_be_bytes());
            }
        }
        let l1_table = self.write_tables()?;
        let layer = self.layer.clone();
        let header = layer.header();
        let NewRefcountTable { offset, clusters } = self.refcounts.write(header)?;
        sector.put(patch::L1_TABLE_OFFSET, &l1_table.0.to_be_bytes());
        sector.put(patch::REFCOUNT_TABLE_OFFSET, &offset.0.to_be_bytes());
        let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        sector.put(patch::REFCOUNT_TABLE_CLUSTERS, &clusters.to_be_bytes());
        if header.version >= Version::V3 {
            let kept = if bitmaps.is_some() { features::BITMAPS } else { 0 };
            sector.put(patch::AUTOCLEAR_FEATURES, &(header.features.autoclear & kept).to_be_bytes());
        }
        Ok(sector.0)
    }

    /// Bitmaps do not follow our writes, so a copy of their directory says that they are in use, which makes readers drop them.
    fn write_bitmap_directory(&mut self, directory: &BitmapDirectory) -> Result<HostOffset, Error> {
        let extension = directory.extension;
        let old = self.clusters(HostOffset(extension.directory_offset), extension.directory_size);
        self.replace(Place::BitmapDirectory, old, directory.bytes_in_use())
    }

    fn write_tables(&mut self) -> Result<HostOffset, Error> {
        let mut l1: Vec<L1Entry> = self.layer.l1().to_vec();
        let tables = std::mem::take(&mut self.tables);
        let written = self.write_l2_tables(&tables, &mut l1);
        // Readers go on seeing the pending state.
        self.tables = tables;
        written?;
        let header = self.header();
        let old = self.clusters(header.l1_table, u64::from(header.l1_size) * 8);
        self.replace(Place::L1Table, old, table_bytes(l1.iter().map(|entry| entry.0)))
    }

    fn write_l2_tables(
        &mut self,
        tables: &std::collections::BTreeMap<u64, PendingTable>,
        l1: &mut [L1Entry],
    ) -> Result<(), Error> {
        let bits = self.header().cluster_bits;
        for (&index, table) in tables {
            let Some(entry) = l1.get_mut(in_memory(index)) else {
                continue;
            };
            let old = std::mem::take(entry);
            if table.entries.iter().any(|&entry| entry != L2Entry::UNALLOCATED) {
                let host = bits.host_offset(HostCluster(self.refcounts.allocate(1)?.start));
                *entry = L1Entry::owned(host);
                self.file().write(&self.header().l2_format().encode(&table.entries), host)?;
            }
            if let Some(old) = old.l2_table() {
                self.refcounts.drop_metadata(bits.host_cluster(old), Place::L2Table(index))?;
            }
        }
        Ok(())
    }

    fn clusters(&self, offset: HostOffset, len: u64) -> Range<u64> {
        let bits = self.header().cluster_bits;
        let first = bits.host_cluster(offset).0;
        first..first + bits.clusters_for(len)
    }

    /// Writes a structure to a new place and gives up the old one.
    fn replace(&mut self, place: Place, old: Range<u64>, mut bytes: Vec<u8>) -> Result<HostOffset, Error> {
        let bits = self.header().cluster_bits;
        let new = self.refcounts.allocate_run(old.end - old.start)?;
        let offset = bits.host_offset(HostCluster(new.start));
        bytes.resize(in_memory((new.end - new.start) << bits.bits()), 0);
        self.file().write(&bytes, offset)?;
        for cluster in old {
            self.refcounts.drop_metadata(HostCluster(cluster), place)?;
        }
        Ok(offset)
    }
}

/// The first sector with room for the bitmap directory's offset, and where in it that lies.
///
/// QEMU puts a table of feature names before the bitmaps extension, which then lies past the first sector. The names say
/// nothing that readers need, so they give way.
pub(super) fn bitmap_directory_field(header: &Header, committed: &Sector) -> Option<(Sector, usize)> {
    let field_of = |data_at: usize| {
        let at = data_at.checked_add(BitmapsExtension::DIRECTORY_OFFSET_AT)?;
        (at.checked_add(8)? <= patch::SECTOR).then_some(at)
    };
    if let Some(at) = field_of(in_memory(header.extension(extension::BITMAPS)?.offset)) {
        return Some((*committed, at));
    }
    let mut area = Vec::new();
    let mut data_at = None;
    let start = in_memory(header.header_length.into());
    for extension in header.extensions.iter().filter(|extension| extension.magic != extension::FEATURE_NAMES) {
        if extension.magic == extension::BITMAPS {
            data_at = Some(start + area.len() + 8);
        }
        extension.encode(&mut area);
    }
    area.extend([0; 8]);
    let mut sector = *committed;
    sector.get_mut(start..)?.fill(0);
    sector.get_mut(start..start + area.len())?.copy_from_slice(&area);
    Some((sector, field_of(data_at?)?))
}

struct Patch(Sector);

impl Patch {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }
}

/// Refuses what must not be written, saying why.
pub(super) fn check_writable(
    layer: &crate::Layer,
    has_backing: bool,
    bitmaps: Option<&BitmapDirectory>,
    committed: &Sector,
) -> Result<(), Error> {
    let header = layer.header();
    if header.extended_l2() || header.has_data_file() {
        return Err(layer.file().unsupported("writing subclusters or an external data file"));
    }
    layer.data_file()?;
    let incompatible = header.features.incompatible;
    let obstacle = if incompatible & features::CORRUPT != 0 {
        WriteObstacle::MarkedCorrupt
    } else if incompatible & features::DIRTY != 0 {
        WriteObstacle::Dirty
    } else if header.backing_name.is_some() != has_backing {
        WriteObstacle::BackingMismatch
    } else if bitmaps.is_some() && bitmap_directory_field(header, committed).is_none() {
        WriteObstacle::BitmapsOutOfReach
    } else if layer.l1().iter().any(|entry| entry.reserved_bits() != 0) {
        let problem = "an entry has reserved bits set";
        return Err(layer.file().corrupt(Corruption::Malformed { place: Place::L1Table, problem }));
    } else {
        return Ok(());
    };
    Err(Error::NotWritable { image: layer.name().to_owned(), obstacle })
}
