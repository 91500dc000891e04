use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use qtk_block::{BlockRead, Extent, ExtentKind, read_padded};

use super::commit::Pointing;
use super::dirty::DirtyRanges;
use super::refcounts::Refcounts;
use crate::bitmap::PendingBitmaps;
use crate::entry::{Cluster, L1Entry, L2Entry};
use crate::error::{Error, Place};
use crate::file::ImageFile;
use crate::header::Header;
use crate::layer::{self, Layer};
use crate::mapping::{self, L2Tables, MappingKind};
use crate::snapshot::SnapshotTable;
use crate::types::{GuestCluster, HostCluster, HostOffset, in_memory};

/// An L2 table that the transaction has changed.
#[derive(Debug)]
pub(super) struct PendingTable {
    pub(super) entries: Box<[L2Entry]>,
    pub(super) origins: Box<[Origin]>,
}

/// Where an entry's cluster comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The committed state.
    Committed,
    /// This transaction, which may write it in place.
    Own,
    /// This transaction, but a snapshot has it too.
    Shared,
}

impl PendingTable {
    fn copy(entries: Option<&[L2Entry]>, len: usize, origin: Origin) -> Self {
        let entries = entries.map_or_else(|| vec![L2Entry::UNALLOCATED; len].into(), Box::from);
        Self { entries, origins: vec![origin; len].into() }
    }
}

/// How far a transaction has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It can be written.
    Open,
    /// Metadata in memory may be half changed: it can only be rolled back.
    Failed,
    /// It has been committed or rolled back.
    Finished,
}

/// The image as the transaction has it.
pub(crate) struct State {
    /// The L2 tables that the transaction has not changed.
    pub(super) layer: Arc<Layer>,
    pub(super) backing: Option<Arc<dyn BlockRead>>,
    /// The header to commit. Tables that only have to make way for the commit keep their place here.
    pub(super) header: Header,
    /// The L1 table to commit.
    pub(super) l1: Vec<L1Entry>,
    pub(super) l1_changed: bool,
    /// L2 tables that have changed for the active L1 table, by its entries.
    pub(super) tables: BTreeMap<u64, PendingTable>,
    /// L2 tables that have changed for all that share them, by their places.
    pub(super) frozen: BTreeMap<HostCluster, Box<[L2Entry]>>,
    /// Structures that hold offsets of others, by their place.
    pub(super) pointing: BTreeMap<HostCluster, Pointing>,
    pub(super) refcounts: Refcounts,
    /// The snapshot table, once it was read, and its length in bytes where it lies now.
    pub(crate) snapshots: Option<(SnapshotTable, u64)>,
    pub(crate) bitmaps: PendingBitmaps,
    /// Kept while some bitmap records writes.
    pub(super) dirty: Option<Mutex<DirtyRanges>>,
    /// Ranges of a data file that the commit leaves unused.
    pub(super) forgotten_data: Vec<Range<u64>>,
    /// Where a data file ends after the commit, at the latest.
    pub(super) data_end: Option<u64>,
    /// Where the compressed data ends that the next may follow.
    pub(super) packed_to: Option<HostOffset>,
    /// Clusters with a single user left, while entries may not say so.
    pub(super) left_alone: Vec<HostCluster>,
    /// Whether a settled commit leaves nothing past the last cluster in use.
    pub(super) cut_tail: bool,
    pub(super) phase: Phase,
}

impl L2Tables for State {
    fn header(&self) -> &Header {
        &self.header
    }

    fn file(&self) -> &ImageFile {
        self.layer.file()
    }

    fn host_end(&self) -> u64 {
        self.layer.storage().size()
    }

    fn l2_table(&self, l1_index: u64) -> Result<Option<&[L2Entry]>, Error> {
        if let Some(table) = self.tables.get(&l1_index) {
            return Ok(Some(&table.entries));
        }
        // The committed state may have a table that the transaction gave up.
        let Some(home) = self.table_home(l1_index) else { return Ok(None) };
        match self.frozen.get(&home) {
            Some(entries) => Ok(Some(entries)),
            None => self.layer.l2_table(l1_index),
        }
    }
}

/// Where a guest cluster's entry is: index of its L2 table, and index in that table.
pub(super) fn slot(header: &Header, cluster: GuestCluster) -> (u64, usize) {
    let entries = header.l2_entries();
    (cluster.0 / entries, in_memory(cluster.0 % entries))
}

impl State {
    pub(super) fn size(&self) -> u64 {
        self.header().size
    }

    /// Fails if the range does not lie on the disk.
    pub(super) fn check_range(&self, range: &Range<u64>) -> Result<(), Error> {
        if range.start <= range.end && range.end <= self.size() {
            return Ok(());
        }
        let image = self.file().name.to_string();
        Err(Error::OutOfRange { image, start: range.start, end: range.end, size: self.size() })
    }

    /// Remembers that a guest range changes.
    pub(super) fn touch(&self, range: Range<u64>) {
        if let Some(dirty) = &self.dirty {
            dirty.lock().unwrap_or_else(PoisonError::into_inner).add(range);
        }
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let mapping = mapping::find(self, at..at.saturating_add(rest.len() as u64))?;
            let (part, tail) = rest.split_at_mut(in_memory(mapping.range.end - at));
            match (&self.backing, mapping.kind) {
                (Some(backing), MappingKind::Unallocated) => self.read_backing(&**backing, part, at)?,
                _ => self.layer.read_mapping(part, &mapping)?,
            }
            (rest, at) = (tail, mapping.range.end);
        }
        Ok(())
    }

    /// A backing image may be smaller than the image on it, which then reads as zeroes past its end.
    fn read_backing(&self, backing: &dyn BlockRead, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        let len = buf.len() as u64;
        read_padded(backing, buf, offset).map_err(|source| {
            let image = self.file().name.to_string();
            Error::Backing { image, offset: crate::types::GuestOffset(offset), len, source }
        })
    }

    /// The run from `range.start` as a reader of the whole chain sees it.
    pub(super) fn extent(&self, range: Range<u64>) -> std::io::Result<Extent> {
        let extent = layer::extent(self, range)?;
        if extent.kind != ExtentKind::Unallocated {
            return Ok(extent);
        }
        let stored = self.backing.as_ref().map_or(0, |backing| backing.size()).min(extent.range.end);
        match &self.backing {
            Some(backing) if extent.range.start < stored => {
                let beneath = backing.extent(extent.range.start..stored)?;
                let kind = if beneath.kind == ExtentKind::Data { ExtentKind::Data } else { ExtentKind::Zero };
                Ok(Extent { kind, ..beneath })
            }
            _ => Ok(Extent { kind: ExtentKind::Zero, ..extent }),
        }
    }

    /// The longest run from `range.start` in one piece of the file that may be written in place: its host offset and length.
    pub(super) fn fresh_run(&self, range: Range<u64>) -> Option<(HostOffset, u64)> {
        let bits = self.header().cluster_bits;
        let first = GuestCluster(range.start >> bits.bits());
        let (l1_index, index) = slot(self.header(), first);
        let pending = self.tables.get(&l1_index);
        let entries = match pending {
            Some(table) => &table.entries,
            None if self.header.has_data_file() => self.l2_table(l1_index).ok()??,
            None => return None,
        };
        let origin_of =
            |index: usize| pending.map_or(Some(Origin::Committed), |table| table.origins.get(index).copied());
        let host_of = |index: usize| {
            let entry = *entries.get(index)?;
            self.place_to_write(entry, origin_of(index)?).filter(|_| entry.is_all_data(self.header.l2_format()))
        };
        let host = host_of(index)?;
        let wanted = bits.clusters_for(range.end) - first.0;
        let clusters = (1..wanted)
            .take_while(|&n| host_of(index + in_memory(n)) == Some(host.plus(n << bits.bits())))
            .count() as u64
            + 1;
        let len = range.end.min((first.0 + clusters) << bits.bits()) - range.start;
        Some((host.plus(bits.offset_within(range.start)), len))
    }

    /// Where a cluster lies that may be written in place: its place is not the committed state's, or has always been outside of
    /// the image.
    pub(super) fn place_to_write(&self, entry: L2Entry, origin: Origin) -> Option<HostOffset> {
        let format = self.header.l2_format();
        match entry.decode(format) {
            Cluster::Data { host } if origin == Origin::Own || format.data_file => {
                Some(host).filter(|host| format.cluster_bits.offset_within(host.0) == 0)
            }
            _ => None,
        }
    }

    /// The L2 table of `l1_index` to change.
    pub(super) fn table_mut(&mut self, l1_index: u64) -> Result<&mut PendingTable, Error> {
        let len = in_memory(self.header.l2_entries());
        let copy = match self.tables.contains_key(&l1_index) {
            true => None,
            false => {
                let frozen = self.table_home(l1_index).is_some_and(|home| self.frozen.contains_key(&home));
                let origin = if frozen { Origin::Shared } else { Origin::Committed };
                let table = PendingTable::copy(self.l2_table(l1_index)?, len, origin);
                self.own_table(l1_index).inspect_err(|_| self.phase = Phase::Failed)?;
                Some(table)
            }
        };
        let new = || copy.unwrap_or_else(|| PendingTable::copy(None, len, Origin::Committed));
        Ok(self.tables.entry(l1_index).or_insert_with(new))
    }

    /// Lets `entry` map a guest cluster and gives up the host clusters that it had.
    pub(super) fn map(&mut self, cluster: GuestCluster, entry: L2Entry, origin: Origin) -> Result<(), Error> {
        let (l1_index, index) = slot(self.header(), cluster);
        let table = self.table_mut(l1_index)?;
        let (Some(old), Some(old_origin)) = (table.entries.get_mut(index), table.origins.get_mut(index)) else {
            return Ok(());
        };
        let (old, old_origin) = (std::mem::replace(old, entry), std::mem::replace(old_origin, origin));
        self.give_up(old, old_origin, cluster).inspect_err(|_| self.phase = Phase::Failed)
    }

    /// Counts one user less of what an entry uses.
    pub(super) fn give_up(&mut self, entry: L2Entry, origin: Origin, cluster: GuestCluster) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let place = Place::L2Entry(bits.guest_offset(cluster));
        for cluster in self.clusters_of(entry, place)?.map(HostCluster) {
            match origin {
                Origin::Committed => self.refcounts.drop_data(cluster, place)?,
                Origin::Own | Origin::Shared => self.refcounts.drop_user(cluster, place)?,
            }
            self.note_given_up(entry, cluster)?;
            // Whatever takes the cluster next has it for itself.
            self.packed_to = self.packed_to.filter(|&at| bits.host_cluster(at) != cluster);
        }
        Ok(())
    }
}
