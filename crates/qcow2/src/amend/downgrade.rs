use super::AmendRefusal;
use crate::error::Error;
use crate::extension;
use crate::features::{self, Features};
use crate::mapping::L2Tables;
use crate::transaction::State;
use crate::types::{CompressionType, Version};

impl State {
    /// Makes the image one of version 2.
    pub(super) fn downgrade(&mut self) -> Result<(), Error> {
        if let Some(refusal) = self.check_downgrade()? {
            return Err(self.cannot_amend(refusal));
        }
        // Version 2 cannot say whether bitmaps followed the disk.
        let bitmaps: Vec<String> = self.bitmaps.list().map(|bitmap| bitmap.name.clone()).collect();
        bitmaps.iter().try_for_each(|name| self.remove_bitmap(name))?;
        self.expand_zeroes()?;
        let header = self.header_mut();
        header.version = Version::V2;
        header.features = Features::default();
        header.compression = CompressionType::Zlib;
        header.unknown_fields.clear();
        header.extensions.retain(|extension| extension.magic != extension::FEATURE_NAMES);
        Ok(())
    }

    fn check_downgrade(&mut self) -> Result<Option<AmendRefusal>, Error> {
        let header = self.header();
        let others = header.features.incompatible & !(features::COMPRESSION_TYPE | features::DIRTY);
        if header.refcount_bits() != 16 {
            return Ok(Some(AmendRefusal::DowngradeRefcountBits));
        }
        if header.has_data_file() {
            return Ok(Some(AmendRefusal::DowngradeDataFile));
        }
        if others != 0 {
            return Ok(Some(AmendRefusal::DowngradeFeatures(others)));
        }
        let size = header.size;
        let zstd = header.compression == CompressionType::Zstd;
        let fits = |entry: &crate::snapshot::SnapshotEntry| {
            let snapshot = &entry.snapshot;
            snapshot.disk_size.is_none_or(|disk_size| disk_size == size)
                && u32::try_from(snapshot.vm_state_size).is_ok()
        };
        if !self.snapshot_table()?.iter().all(fits) {
            return Ok(Some(AmendRefusal::DowngradeSnapshots));
        }
        Ok((zstd && self.has_compressed_clusters()?).then_some(AmendRefusal::DowngradeZstd))
    }
}
