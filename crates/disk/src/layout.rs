use std::ops::Range;
use std::sync::Arc;

use qtk_block::{BlockRead, Window};

use crate::fstab::Source;
use crate::{Content, Error, Partition, PartitionTable, Place, Probe};

/// A partition, or a whole disk without partitions, and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// How messages call it.
    pub place: Place,
    /// Where it lies on the disk, in bytes.
    pub range: Range<u64>,
    /// Its entry in the partition table.
    pub partition: Option<Partition>,
    /// What it holds.
    pub probe: Probe,
}

/// How a disk is divided, and what is where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The partition table, if there is one.
    pub table: Option<PartitionTable>,
    /// All partitions by number, or the disk as a whole.
    pub slots: Vec<Slot>,
}

impl Layout {
    /// Reads the partition table and the head of every partition.
    pub fn read(device: &Arc<dyn BlockRead>) -> Result<Self, Error> {
        let slot = |place: Place, range: Range<u64>, partition: Option<Partition>| {
            let window = Window::new(Arc::clone(device), range.clone());
            let probe = window.and_then(|window| Probe::read(&(Arc::new(window) as Arc<dyn BlockRead>)));
            let probe = probe.map_err(|source| Error::Io { action: "read", place, source })?;
            Ok(Slot { place, range, partition, probe })
        };
        // An empty table is what a boot sector without partitions looks like: the disk may be a file system all the same.
        let table = PartitionTable::read(device)?.filter(|table| !table.partitions.is_empty());
        let slots = match &table {
            None => vec![slot(Place::Disk, 0..device.size(), None)?],
            Some(table) => table
                .partitions
                .iter()
                .map(|partition| {
                    slot(Place::Partition(partition.number), partition.range.clone(), Some(partition.clone()))
                })
                .collect::<Result<_, Error>>()?,
        };
        Ok(Self { table, slots })
    }

    /// The slot that an fstab entry names.
    #[must_use]
    pub fn find(&self, source: &Source) -> Option<&Slot> {
        let is_named = |slot: &&Slot| {
            let partition = slot.partition.as_ref();
            match source {
                Source::Label(label) => slot.probe.label.as_ref() == Some(label),
                Source::Uuid(uuid) => slot.probe.uuid.as_ref().is_some_and(|found| found.eq_ignore_ascii_case(uuid)),
                Source::PartUuid(uuid) => partition.is_some_and(|found| found.part_uuid.eq_ignore_ascii_case(uuid)),
                Source::PartLabel(label) => {
                    partition.and_then(|found| found.name.as_ref()).is_some_and(|name| name.as_bytes() == label)
                }
                Source::Partition(number) => partition.is_some_and(|found| found.number == *number),
                Source::Disk => slot.place == Place::Disk,
                Source::Root | Source::Other(_) => false,
            }
        };
        self.slots.iter().find(is_named)
    }

    /// The slot of a partition.
    ///
    /// # Errors
    /// Names the partitions there are.
    pub fn partition(&self, number: u32) -> Result<&Slot, Error> {
        let slot = self.slots.iter().find(|slot| slot.place == Place::Partition(number));
        slot.ok_or_else(|| Error::NoSuchPartition {
            number,
            present: self.slots.iter().filter_map(|slot| slot.partition.as_ref()).map(|found| found.number).collect(),
        })
    }

    pub(crate) fn contents<'a>(slots: impl IntoIterator<Item = &'a Slot>) -> Vec<(Place, Content)> {
        slots.into_iter().map(|slot| (slot.place, slot.probe.content)).collect()
    }
}
