use std::ops::Range;

use qtk_block::ExtentKind;

use super::state::{Origin, State, slot};
use crate::entry::L2Entry;
use crate::error::{Action, Error};
use crate::mapping::{self, L2Tables, MappingKind};
use crate::types::{GuestCluster, GuestOffset, HostCluster, HostOffset, Version, in_memory};

impl State {
    /// Writes as much from the front of `buf` as lies in clusters that may be written in place; returns how much.
    pub(super) fn write_in_place(&self, buf: &[u8], offset: u64) -> Result<usize, Error> {
        let mut done = 0;
        self.touch(offset..offset + buf.len() as u64);
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            let at = offset + done as u64;
            let Some((host, len)) = self.fresh_run(at..at + rest.len() as u64) else {
                break;
            };
            self.layer.data_file()?.write(&rest[..in_memory(len)], host)?;
            done += in_memory(len);
        }
        Ok(done)
    }

    pub(super) fn write(&mut self, buf: &[u8], offset: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < buf.len() {
            done += self.write_in_place(&buf[done..], offset + done as u64)?;
            let (rest, at) = (&buf[done..], offset + done as u64);
            if rest.is_empty() {
                break;
            }
            done += match self.whole_clusters_of(rest, at) {
                Some(whole) => self.write_new(whole, at)?,
                None => self.write_subclusters(rest, at)?,
            };
        }
        Ok(())
    }

    /// What to write to new clusters of its own: all of it, but only whole clusters where they can be written in parts.
    fn whole_clusters_of<'a>(&self, buf: &'a [u8], offset: u64) -> Option<&'a [u8]> {
        let format = self.header().l2_format();
        if !format.extended {
            return Some(buf);
        }
        let bits = format.cluster_bits;
        let whole = buf.len() - buf.len() % bits.buffer_len();
        (bits.offset_within(offset) == 0 && whole > 0).then(|| &buf[..whole])
    }

    /// Writes the front of `buf` to newly taken clusters, as many as there are in one piece; returns how much.
    fn write_new(&mut self, buf: &[u8], offset: u64) -> Result<usize, Error> {
        let bits = self.header().cluster_bits;
        let wanted = self.stale_run(offset..offset + buf.len() as u64)?;
        let taken = self.take_for_guest(wanted.clone())?;
        let guest_end = wanted.start + (taken.end - taken.start);
        let len = (guest_end << bits.bits()).min(offset + buf.len() as u64) - offset;
        let host = bits.host_offset(HostCluster(taken.start));
        let buf = &buf[..in_memory(len)];
        if let Err(error) = self.fill_clusters(buf, offset, host) {
            // Nothing maps them yet, so the transaction can go on as if it had not tried.
            self.give_back(taken)?;
            return Err(error);
        }
        let format = self.header().l2_format();
        for (guest, host) in (wanted.start..guest_end).zip(taken) {
            self.map(GuestCluster(guest), L2Entry::owned(bits.host_offset(HostCluster(host)), format), Origin::Own)?;
        }
        Ok(buf.len())
    }

    /// Takes clusters for the front of a run of the guest's, all in one piece. In a data file each has its place.
    pub(super) fn take_for_guest(&mut self, wanted: Range<u64>) -> Result<Range<u64>, Error> {
        if self.header().has_data_file() { Ok(wanted) } else { self.refcounts.allocate(wanted.end - wanted.start) }
    }

    pub(super) fn give_back(&mut self, taken: Range<u64>) -> Result<(), Error> {
        if self.header().has_data_file() { Ok(()) } else { self.refcounts.give_back(taken) }
    }

    /// The guest clusters from the range's start on that must move before they are written, within one L2 table.
    fn stale_run(&mut self, range: Range<u64>) -> Result<Range<u64>, Error> {
        let bits = self.header().cluster_bits;
        let first = range.start >> bits.bits();
        let (l1_index, index) = slot(self.header(), GuestCluster(first));
        let wanted = in_memory(bits.clusters_for(range.end) - first);
        self.table_mut(l1_index)?;
        let Some(table) = self.tables.get(&l1_index) else {
            return Ok(first..first + 1);
        };
        let format = self.header().l2_format();
        let clusters = table.entries.iter().zip(&table.origins).skip(index).take(wanted);
        let stale = clusters.take_while(|&(&entry, &origin)| {
            self.place_to_write(entry, origin).is_none() || !entry.is_all_data(format)
        });
        Ok(first..first + (stale.count() as u64).max(1))
    }

    /// Writes whole clusters at `host`: `buf`, and around it what the guest's clusters held so far.
    fn fill_clusters(&self, buf: &[u8], offset: u64, host: HostOffset) -> Result<(), Error> {
        let bits = self.header().cluster_bits;
        let end = offset + buf.len() as u64;
        let before = in_memory(bits.offset_within(offset));
        let after = in_memory(end.next_multiple_of(bits.size()) - end);
        // A cluster's worth in the middle goes out from the caller's buffer, the ends with what surrounds them.
        let head = if before == 0 { 0 } else { buf.len().min(bits.buffer_len() - before) };
        let (head, rest) = buf.split_at(head);
        let tail = if after == 0 { 0 } else { rest.len().min(bits.buffer_len() - after) };
        let (middle, tail) = rest.split_at(rest.len() - tail);
        if !head.is_empty() {
            let padding = if rest.is_empty() { after } else { 0 };
            self.fill_cluster(head, offset, before, padding, host)?;
        }
        let middle_at = host.plus((before + head.len()) as u64);
        if !middle.is_empty() {
            self.layer.data_file()?.write(middle, middle_at)?;
        }
        if !tail.is_empty() {
            let tail_offset = end - tail.len() as u64;
            self.fill_cluster(tail, tail_offset, 0, after, middle_at.plus(middle.len() as u64))?;
        }
        Ok(())
    }

    /// Writes (sub)clusters at `host`: `before` bytes that the guest's disk held there, `buf`, and `after` bytes of the old again.
    pub(super) fn fill_cluster(
        &self,
        buf: &[u8],
        offset: u64,
        before: usize,
        after: usize,
        host: HostOffset,
    ) -> Result<(), Error> {
        let mut cluster = vec![0; before + buf.len() + after];
        let (head, rest) = cluster.split_at_mut(before);
        let (middle, tail) = rest.split_at_mut(buf.len());
        middle.copy_from_slice(buf);
        self.read(head, offset - before as u64)?;
        let end = offset + buf.len() as u64;
        let on_disk = tail.len().min(in_memory(self.size().saturating_sub(end)));
        self.read(&mut tail[..on_disk], end)?;
        self.layer.data_file()?.write(&cluster, host)
    }

    /// Makes a range read as zeroes; whole clusters lose their place in the file.
    pub(super) fn zero(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.touch(range.clone());
        self.zero_raw_data(&range)?;
        let range = self.widened(range)?;
        let whole = self.whole_clusters(&range);
        if whole.is_empty() {
            return self.zero_parts(range);
        }
        let bits = self.header().cluster_bits;
        let (start, end) = (whole.start << bits.bits(), (whole.end << bits.bits()).min(self.size()));
        self.zero_parts(range.start..start)?;
        self.zero_clusters(whole)?;
        self.zero_parts(end.min(range.end)..range.end)
    }

    /// Gives up the whole clusters in a range, which then read as zeroes; where that would need space, does nothing.
    pub(super) fn discard(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.touch(range.clone());
        if self.backing.is_some() && self.header().version < Version::V3 {
            return Ok(());
        }
        let bits = self.header().cluster_bits;
        let whole = self.whole_clusters(&range);
        self.zero_raw_data(&(whole.start << bits.bits()..(whole.end << bits.bits()).min(range.end)))?;
        self.zero_clusters(whole)
    }

    /// A raw data file is the guest's disk, whatever the entries say.
    fn zero_raw_data(&self, range: &Range<u64>) -> Result<(), Error> {
        if !self.header().data_file_raw() || range.is_empty() {
            return Ok(());
        }
        let data = self.layer.data_file()?;
        let zeroed = data.storage.zero(range.start..range.end.min(data.storage.size()).max(range.start));
        zeroed.map_err(|source| data.io(Action::Write, range.start, range.end - range.start, source))
    }

    /// Remembers that nothing will need some clusters of a data file of our own any more.
    fn forget_data(&mut self, clusters: Range<u64>) {
        if self.header().has_data_file() && !self.header().data_file_raw() {
            let bits = self.header().cluster_bits.bits();
            self.forgotten_data.push(clusters.start << bits..clusters.end << bits);
        }
    }

    /// Ranges of a data file that were given up and not written again.
    pub(super) fn unused_data(&self) -> Result<Vec<Range<u64>>, Error> {
        let mut unused = Vec::new();
        for range in &self.forgotten_data {
            let mut at = range.start;
            while at < range.end.min(self.size()) {
                let found = mapping::find(self, at..range.end.min(self.size()))?;
                at = found.range.end;
                if matches!(found.kind, MappingKind::Unallocated | MappingKind::Zero { host: None }) {
                    unused.push(found.range);
                }
            }
        }
        Ok(unused)
    }

    /// A range that is to be zero, with the rest of the clusters (or subclusters) at its ends where that is zero anyway: as in
    /// QEMU, they are marked as a whole then.
    fn widened(&self, range: Range<u64>) -> Result<Range<u64>, Error> {
        let format = self.header().l2_format();
        let grain = 1_u64 << format.grain_bits();
        if !format.zero_flag || range.is_empty() {
            return Ok(range);
        }
        let start = range.start / grain * grain;
        let end = range.end.checked_next_multiple_of(grain).unwrap_or(u64::MAX).min(self.size());
        let front = self.reads_as_zero(start..range.start)?;
        let back = self.reads_as_zero(range.end..end)?;
        if end - start <= grain && !(front && back) {
            return Ok(range);
        }
        Ok(if front { start } else { range.start }..if back { end } else { range.end })
    }

    /// Whether a range is known to be zero without a look at its data.
    fn reads_as_zero(&self, range: Range<u64>) -> Result<bool, Error> {
        let mut at = range.start;
        while at < range.end {
            let run = mapping::find(self, at..range.end)?;
            at = match (run.kind, &self.backing) {
                (MappingKind::Zero { .. }, _) | (MappingKind::Unallocated, None) => run.range.end,
                (MappingKind::Unallocated, Some(backing)) => {
                    let stored = run.range.end.min(backing.size());
                    if at >= stored {
                        run.range.end
                    } else {
                        let extent = backing.extent(at..stored).map_err(|source| {
                            let (image, len) = (self.layer.name().to_owned(), stored - at);
                            Error::Backing { image, offset: GuestOffset(at), len, source }
                        })?;
                        if extent.kind == ExtentKind::Data {
                            return Ok(false);
                        }
                        extent.range.end
                    }
                }
                _ => return Ok(false),
            };
        }
        Ok(true)
    }

    /// The clusters that lie in a range as far as they lie on the disk.
    fn whole_clusters(&self, range: &Range<u64>) -> Range<u64> {
        let bits = self.header().cluster_bits;
        let end = if range.end == self.size() { bits.clusters_for(range.end) } else { range.end >> bits.bits() };
        bits.clusters_for(range.start)..end
    }

    pub(super) fn write_zeroes(&mut self, range: Range<u64>) -> Result<(), Error> {
        let zeroes = vec![0; in_memory(range.end.saturating_sub(range.start)).min(1 << 20)];
        let mut at = range.start;
        while at < range.end {
            let mapping = mapping::find(self, at..range.end)?;
            let end = mapping.range.end.min(at + zeroes.len() as u64);
            match mapping.kind {
                MappingKind::Zero { .. } => {}
                MappingKind::Unallocated if self.backing.is_none() => {}
                _ => self.write(&zeroes[..in_memory(end - at)], at)?,
            }
            at = end;
        }
        Ok(())
    }

    fn zero_clusters(&mut self, clusters: Range<u64>) -> Result<(), Error> {
        let bits = self.header().cluster_bits;
        let entry = match (self.header().version, self.backing.is_some()) {
            (Version::V3, _) => L2Entry::plain_zero(self.header().l2_format()),
            (Version::V2, false) => L2Entry::UNALLOCATED,
            (Version::V2, true) => {
                return self
                    .write_zeroes(clusters.start << bits.bits()..(clusters.end << bits.bits()).min(self.size()));
            }
        };
        self.discard_clusters(clusters, entry)
    }

    /// Gives up the places of clusters, whose entries become `entry`; those that read as it does without it stay as they are.
    pub(super) fn discard_clusters(&mut self, clusters: Range<u64>, entry: L2Entry) -> Result<(), Error> {
        let bits = self.header().cluster_bits;
        let mut next = clusters.start;
        while next < clusters.end {
            let run = mapping::find(self, next << bits.bits()..(clusters.end << bits.bits()).min(self.size()))?;
            let reads_alike = match run.kind {
                MappingKind::Unallocated => entry == L2Entry::UNALLOCATED,
                MappingKind::Zero { host: None } => entry != L2Entry::UNALLOCATED,
                _ => false,
            };
            // A run may end among the subclusters of its first cluster, of which others then are something else.
            let at_end = run.range.end == self.size();
            let whole = if at_end { bits.clusters_for(run.range.end) } else { run.range.end >> bits.bits() };
            let end = whole.max(next + 1);
            if !reads_alike || whole <= next {
                self.forget_data(next..end);
                for cluster in next..end {
                    self.map(GuestCluster(cluster), entry, Origin::Committed)?;
                }
            }
            next = end;
        }
        Ok(())
    }
}
