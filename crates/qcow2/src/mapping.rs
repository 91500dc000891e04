use std::ops::Range;

use qtk_block::ExtentKind;

use crate::entry::{Cluster, L2Entry, L2Format, Subcluster};
use crate::error::{Corruption, Error, Place};
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{ClusterBits, GuestCluster, HostOffset, in_memory};

/// A run of the guest's disk that is stored in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Byte range on the guest's disk.
    pub range: Range<u64>,
    /// How it is stored.
    pub kind: MappingKind,
}

/// How a layer stores a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Not at all: reads through to the backing image.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// Where the run's clusters are reserved in the file that holds guest data, if they are. What they hold does not count.
        host: Option<HostOffset>,
    },
    /// In one piece of the file that holds guest data.
    Data {
        /// Where the run's first byte lies. The file may end within the run; the rest reads as zeroes.
        host: HostOffset,
    },
    /// Compressed. The run lies in a single cluster.
    Compressed {
        /// Where the compressed data of the whole cluster begins.
        host: HostOffset,
        /// Its length in bytes up to the end of its last sector, or of the file.
        len: u64,
    },
}

impl MappingKind {
    /// What the run is to a reader who knows nothing of qcow2.
    #[must_use]
    pub fn extent_kind(self) -> ExtentKind {
        match self {
            Self::Unallocated => ExtentKind::Unallocated,
            Self::Zero { .. } => ExtentKind::Zero,
            Self::Data { .. } | Self::Compressed { .. } => ExtentKind::Data,
        }
    }

    /// Whether `next` continues this run, which is `bytes` long so far.
    fn continues(self, bytes: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Unallocated, Self::Unallocated) => true,
            (Self::Zero { host: None }, Self::Zero { host: None }) => true,
            (Self::Zero { host: Some(a) }, Self::Zero { host: Some(b) })
            | (Self::Data { host: a }, Self::Data { host: b }) => a.plus(bytes) == b,
            _ => false,
        }
    }

    /// The same run without its first `bytes`, for which a compressed cluster has no address.
    #[must_use]
    pub fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Zero { host: Some(host) } => Self::Zero { host: Some(host.plus(bytes)) },
            Self::Data { host } => Self::Data { host: host.plus(bytes) },
            other => other,
        }
    }
}

/// The L2 tables of an image in some state: as committed, or as a transaction has them.
pub(crate) trait L2Tables {
    fn header(&self) -> &Header;
    fn file(&self) -> &ImageFile;
    /// The end of the image's file, which entries may point into.
    fn host_end(&self) -> u64;
    /// The L2 table of an L1 entry.
    fn l2_table(&self, l1_index: u64) -> Result<Option<&[L2Entry]>, Error>;
}

/// The longest run of one kind from `range.start`, which must lie on the disk, to `range.end` at most.
pub(crate) fn find(tables: &impl L2Tables, range: Range<u64>) -> Result<Mapping, Error> {
    let header = tables.header();
    if range.is_empty() || range.end > header.size {
        let image = tables.file().name.to_string();
        return Err(Error::OutOfRange { image, start: range.start, end: range.end, size: header.size });
    }
    let format = header.l2_format();
    let bits = format.cluster_bits;
    if !format.extended && range.end - range.start <= bits.size() - bits.offset_within(range.start) {
        return find_in_cluster(tables, format, range);
    }
    let first = range.start >> format.grain_bits();
    let end = range.end.div_ceil(1 << format.grain_bits());
    let mut run = Run { format, first, next: first, end, kind: None };
    while run.next < run.end {
        match extend(tables, &mut run) {
            Ok(true) => {}
            // What lies before damage stays readable.
            Err(error) if run.kind.is_none() => return Err(error),
            Ok(false) | Err(_) => break,
        }
    }
    let skipped = range.start - (first << format.grain_bits());
    let kind = run.kind.unwrap_or(MappingKind::Unallocated).skip(skipped);
    let end = u64::try_from(u128::from(run.next) << format.grain_bits()).unwrap_or(u64::MAX);
    Ok(Mapping { range: range.start..range.end.min(end), kind })
}

/// The same for a range of one cluster without subclusters, such as most that a guest reads.
fn find_in_cluster(tables: &impl L2Tables, format: L2Format, range: Range<u64>) -> Result<Mapping, Error> {
    let (bits, table_bits) = (format.cluster_bits, format.entries().ilog2());
    let cluster = range.start >> bits.bits();
    let table = tables.l2_table(cluster >> table_bits)?;
    let entry = table.and_then(|table| table.get(in_memory(cluster & ((1 << table_bits) - 1))));
    let kind = match entry {
        Some(&entry) => checked(entry, GuestCluster(cluster), format, tables.host_end()),
        None => Ok(MappingKind::Unallocated),
    };
    let kind = kind.map_err(|what| tables.file().corrupt(what))?;
    Ok(Mapping { kind: kind.skip(bits.offset_within(range.start)), range })
}

/// Grains (subclusters, or clusters where there are none) `first..next`, known to be of one kind, and `end`, where the search ends.
struct Run {
    format: L2Format,
    first: u64,
    next: u64,
    end: u64,
    kind: Option<MappingKind>,
}

impl Run {
    /// Takes in the grains up to `next` if they continue the run.
    fn take(&mut self, kind: MappingKind, next: u64) -> bool {
        let bytes = (self.next - self.first) << self.format.grain_bits();
        let continues = self.kind.is_none_or(|so_far| so_far.continues(bytes, kind));
        if continues {
            self.kind.get_or_insert(kind);
            self.next = next.min(self.end);
        }
        continues
    }

    fn per_cluster(&self) -> u64 {
        1 << (self.format.cluster_bits.bits() - self.format.grain_bits())
    }

    /// Takes in the cluster of the next grain as far as it continues the run; false if the run ends within.
    fn take_cluster(&mut self, entry: L2Entry, kind: MappingKind) -> bool {
        let per_cluster = self.per_cluster();
        let cluster_end = (self.next / per_cluster + 1) * per_cluster;
        if !self.format.extended || matches!(kind, MappingKind::Compressed { .. }) {
            return self.take(kind, cluster_end);
        }
        while self.next < self.end.min(cluster_end) {
            let within = self.next % per_cluster;
            let (state, count) = entry.subclusters(u32::try_from(within).unwrap_or_default());
            let host = match kind {
                MappingKind::Data { host } => Some(host.plus(within << self.format.grain_bits())),
                _ => None,
            };
            let kind = match (state, host) {
                (Subcluster::Data, Some(host)) => MappingKind::Data { host },
                (Subcluster::Zero, host) => MappingKind::Zero { host },
                (Subcluster::Unallocated | Subcluster::Data, _) => MappingKind::Unallocated,
            };
            if !self.take(kind, self.next + u64::from(count)) {
                return false;
            }
        }
        true
    }
}

/// Extends a run to the end of the L2 table that maps its next grain; false if the run ends before.
fn extend(tables: &impl L2Tables, run: &mut Run) -> Result<bool, Error> {
    let (per_table, per_cluster) = (run.format.entries(), run.per_cluster());
    let cluster = run.next / per_cluster;
    let l1_index = cluster / per_table;
    let end = run.end.min((l1_index + 1) * per_table * per_cluster);
    let Some(table) = tables.l2_table(l1_index)? else {
        return Ok(run.take(MappingKind::Unallocated, end));
    };
    let host_end = tables.host_end();
    let mut rest = table.get(in_memory(cluster % per_table)..).unwrap_or_default();
    while run.next < end
        && let Some((&entry, following)) = rest.split_first()
    {
        let guest = GuestCluster(run.next / per_cluster);
        let kind = checked(entry, guest, run.format, host_end).map_err(|what| tables.file().corrupt(what))?;
        if !run.take_cluster(entry, kind) {
            return Ok(false);
        }
        let more = entry.continued_by(following, run.format, host_end).min(in_memory(end - run.next));
        run.next += more as u64;
        rest = &following[more..];
    }
    Ok(run.next == end)
}

/// The front of a run that is not allocated, and the place that it would have in clusters of which other parts are.
pub(crate) fn find_reserved(
    tables: &impl L2Tables,
    range: Range<u64>,
) -> Result<(Range<u64>, Option<HostOffset>), Error> {
    let format = tables.header().l2_format();
    let (bits, per_table) = (format.cluster_bits, format.entries());
    let (first, end) = (range.start >> bits.bits(), bits.clusters_for(range.end));
    let mut found: Option<Option<HostOffset>> = None;
    let mut next = first;
    while next < end {
        let table = tables.l2_table(next / per_table)?;
        let entry = table.and_then(|table| table.get(in_memory(next % per_table)));
        let host = entry.and_then(|entry| match entry.decode(format) {
            Cluster::Data { host } => Some(host),
            _ => None,
        });
        let so_far = (next - first) << bits.bits();
        let expected = *found.get_or_insert(host);
        if expected.map(|start| start.plus(so_far)) != host {
            break;
        }
        next = if table.is_some() { next + 1 } else { end.min((next / per_table + 1) * per_table) };
    }
    let host = found.flatten().map(|host| host.plus(bits.offset_within(range.start)));
    Ok((range.start..range.end.min(next << bits.bits()), host))
}

/// What an entry says of its cluster, after a check that it makes sense and points into the file.
fn checked(entry: L2Entry, guest: GuestCluster, format: L2Format, host_end: u64) -> Result<MappingKind, Corruption> {
    let bits = format.cluster_bits;
    let place = || Place::L2Entry(bits.guest_offset(guest));
    let data_cluster = |host: HostOffset, may_lie_past_the_end: bool| {
        if bits.offset_within(host.0) != 0 {
            return Err(Corruption::Misaligned { place: place(), offset: host });
        }
        if host.0 >= host_end && !may_lie_past_the_end {
            return Err(Corruption::PastEnd { place: place(), offset: host, len: bits.size(), file_size: host_end });
        }
        Ok(host)
    };
    if let Some(problem) = contradiction(entry, guest, format) {
        return Err(Corruption::Malformed { place: place(), problem });
    }
    Ok(match entry.decode(format) {
        Cluster::Unallocated => MappingKind::Unallocated,
        Cluster::Zero { host: None } => MappingKind::Zero { host: None },
        Cluster::Zero { host: Some(host) } => MappingKind::Zero { host: Some(data_cluster(host, true)?) },
        Cluster::Data { host } => {
            // A data file need not reach as far as the disk, and subclusters may be allocated without being written.
            MappingKind::Data { host: data_cluster(host, format.data_file || format.extended)? }
        }
        Cluster::Compressed { host, len } => {
            if host.0 >= host_end {
                return Err(Corruption::PastEnd { place: place(), offset: host, len, file_size: host_end });
            }
            MappingKind::Compressed { host, len: len.min(host_end - host.0) }
        }
    })
}

/// What makes no sense in an entry, as to what it is there for.
fn contradiction(entry: L2Entry, guest: GuestCluster, format: L2Format) -> Option<&'static str> {
    let cluster = entry.decode(format);
    match cluster {
        Cluster::Zero { .. } if !format.zero_flag => Some("it has the zero flag, in version 2"),
        Cluster::Compressed { .. } if format.data_file => {
            Some("it is compressed, in an image with an external data file")
        }
        Cluster::Data { host } if format.data_file && host.0 != format.cluster_bits.guest_offset(guest).0 => {
            Some("its place in the data file is not its place on the disk")
        }
        Cluster::Data { .. } | Cluster::Unallocated if format.extended => entry.contradiction(cluster),
        _ => None,
    }
}

/// The part of a cluster that a range covers, relative to the cluster's start.
pub(crate) fn within_cluster(bits: ClusterBits, range: &Range<u64>) -> Range<usize> {
    let start = bits.offset_within(range.start);
    in_memory(start)..in_memory(start + (range.end - range.start))
}
