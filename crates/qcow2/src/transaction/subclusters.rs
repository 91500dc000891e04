use std::ops::Range;

use super::state::{Origin, State, slot};
use crate::entry::{Cluster, L2Entry, L2Format, Subcluster};
use crate::error::Error;
use crate::mapping::{self, L2Tables, MappingKind};
use crate::types::{GuestCluster, GuestOffset, HostCluster, HostOffset, in_memory};

impl State {
    /// Writes the front of `buf` to a part of a cluster that has subclusters; returns how much. Those that it does not touch
    /// stay what they are.
    pub(super) fn write_subclusters(&mut self, buf: &[u8], offset: u64) -> Result<usize, Error> {
        let format = self.header().l2_format();
        let bits = format.cluster_bits;
        let cluster = bits.guest_cluster(GuestOffset(offset));
        let start = bits.guest_offset(cluster).0;
        let buf = &buf[..buf.len().min(bits.buffer_len() - in_memory(offset - start))];
        let touched = grains(format, offset - start..offset - start + buf.len() as u64);
        let (l1_index, index) = slot(self.header(), cluster);
        let table = self.table_mut(l1_index)?;
        let (Some(&entry), Some(&origin)) = (table.entries.get(index), table.origins.get(index)) else {
            return Ok(0);
        };
        if let Some(host) = self.place_to_write(entry, origin) {
            self.fill_subclusters(buf, offset, start, &touched, host)?;
            let entry = entry.with_subclusters(touched, Subcluster::Data);
            if let Some(stored) = self.table_mut(l1_index)?.entries.get_mut(index) {
                *stored = entry;
            }
            return Ok(buf.len());
        }
        let taken = self.take_for_guest(cluster.0..cluster.0 + 1)?;
        let host = bits.host_offset(HostCluster(taken.start));
        let filled = self
            .copy_subclusters(entry, start, &touched, host)
            .and_then(|states| self.fill_subclusters(buf, offset, start, &touched, host).map(|()| states));
        match filled {
            Ok(states) => {
                let owned = L2Entry { subclusters: states, ..L2Entry::owned(host, format) };
                self.map(cluster, owned.with_subclusters(touched, Subcluster::Data), Origin::Own)?;
                Ok(buf.len())
            }
            Err(error) => {
                self.give_back(taken)?;
                Err(error)
            }
        }
    }

    /// Writes `buf`, and what the disk holds around it in the same subclusters, to a cluster at `host`.
    fn fill_subclusters(
        &self,
        buf: &[u8],
        offset: u64,
        start: u64,
        touched: &Range<u32>,
        host: HostOffset,
    ) -> Result<(), Error> {
        let part = bytes(self.header().l2_format(), touched);
        let before = offset - (start + part.start);
        let after = start + part.end - (offset + buf.len() as u64);
        self.fill_cluster(buf, offset, in_memory(before), in_memory(after), host.plus(part.start))
    }

    /// Copies the subclusters of a cluster that hold data, but not those in `except`, to a cluster at `host`; returns the states
    /// of all subclusters there.
    fn copy_subclusters(
        &self,
        entry: L2Entry,
        start: u64,
        except: &Range<u32>,
        host: HostOffset,
    ) -> Result<u64, Error> {
        let format = self.header().l2_format();
        let compressed = matches!(entry.decode(format), Cluster::Compressed { .. });
        let states = if compressed { L2Entry::owned(host, format) } else { entry };
        let mut at = 0;
        while at < L2Format::SUBCLUSTERS {
            let (state, count) = states.subclusters(at);
            let run = at..at + count;
            at = run.end;
            if state != Subcluster::Data {
                continue;
            }
            for part in [run.start..run.end.min(except.start), run.start.max(except.end)..run.end] {
                let range = bytes(format, &part);
                let end = (start + range.end).min(self.size());
                if start + range.start < end {
                    let mut content = vec![0; in_memory(range.end - range.start)];
                    self.read(&mut content[..in_memory(end - (start + range.start))], start + range.start)?;
                    self.layer.data_file()?.write(&content, host.plus(range.start))?;
                }
            }
        }
        Ok(states.subclusters)
    }

    /// The entry that maps a cluster.
    pub(super) fn entry(&self, cluster: GuestCluster) -> Result<L2Entry, Error> {
        let (l1_index, index) = slot(self.header(), cluster);
        Ok(self.l2_table(l1_index)?.and_then(|entries| entries.get(index)).copied().unwrap_or_default())
    }

    /// Makes parts of clusters read as zeroes; whole subclusters need no data for that.
    pub(super) fn zero_parts(&mut self, range: Range<u64>) -> Result<(), Error> {
        let format = self.header().l2_format();
        if !format.extended {
            return self.write_zeroes(range);
        }
        let bits = format.cluster_bits;
        let mut at = range.start;
        while at < range.end {
            let cluster = bits.guest_cluster(GuestOffset(at));
            let start = bits.guest_offset(cluster).0;
            let end = range.end.min(start.saturating_add(bits.size()));
            self.zero_part(cluster, at - start..end - start)?;
            at = end;
        }
        Ok(())
    }

    /// The same for a part of one cluster, in bytes from its start.
    fn zero_part(&mut self, cluster: GuestCluster, part: Range<u64>) -> Result<(), Error> {
        let format = self.header().l2_format();
        let start = format.cluster_bits.guest_offset(cluster).0;
        let grain = 1 << format.grain_bits();
        let whole_end =
            if start + part.end == self.size() { part.end.next_multiple_of(grain) } else { part.end / grain * grain };
        let whole = part.start.next_multiple_of(grain)..whole_end;
        let (l1_index, index) = slot(self.header(), cluster);
        let entry = self.entry(cluster)?;
        if whole.is_empty() || matches!(entry.decode(format), Cluster::Compressed { .. }) {
            return self.write_zeroes(start + part.start..start + part.end);
        }
        self.write_zeroes(start + part.start..start + whole.start)?;
        let found = mapping::find(self, start + whole.start..(start + whole.end).min(self.size()))?;
        let is_marked = matches!(found.kind, MappingKind::Zero { .. });
        if !is_marked || found.range.end < (start + whole.end).min(self.size()) {
            let zeroed = grains(format, whole.clone());
            if let Some(entry) = self.table_mut(l1_index)?.entries.get_mut(index) {
                *entry = entry.with_subclusters(zeroed, Subcluster::Zero);
            }
        }
        self.write_zeroes(start + whole.end.min(part.end)..start + part.end)
    }
}

/// The subclusters that a part of a cluster touches.
fn grains(format: L2Format, part: Range<u64>) -> Range<u32> {
    let index = |grain: u64| u32::try_from(grain).unwrap_or(L2Format::SUBCLUSTERS);
    index(part.start >> format.grain_bits())..index(part.end.div_ceil(1 << format.grain_bits()))
}

/// The part of a cluster that subclusters take, in bytes.
fn bytes(format: L2Format, grains: &Range<u32>) -> Range<u64> {
    u64::from(grains.start) << format.grain_bits()..u64::from(grains.end.max(grains.start)) << format.grain_bits()
}
