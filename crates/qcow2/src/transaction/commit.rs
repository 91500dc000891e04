use std::collections::BTreeMap;

use super::refcounts::Refcounts;
use super::state::State;
use crate::entry::{L1Entry, L2Entry};
use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::extension;
use crate::features;
use crate::file::{table_bytes, words};
use crate::header::Header;
use crate::mapping::L2Tables;
use crate::snapshot;
use crate::types::{HostCluster, HostOffset};

/// A structure whose content says where others lie, kept until the commit knows their places.
#[derive(Clone, Debug)]
pub(super) struct Pointing {
    pub(super) place: Place,
    pub(super) bytes: Vec<u8>,
}

/// Structures that a commit writes elsewhere than to their lasting places, because the committed state has those.
#[derive(Debug, Default)]
struct Moves(BTreeMap<HostCluster, HostCluster>);

/// What replaces the header to make a commit happen, and to settle it.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) header: Header,
    pub(super) lasting: Option<Lasting>,
}

/// The refcounts of the settled image; its other structures are those of the state.
#[derive(Debug)]
pub(super) struct Lasting {
    refcounts: Refcounts,
    moves: Moves,
    /// Where the file ended before metadata was written.
    written: u64,
}

impl State {
    /// Whether a commit would change nothing.
    pub(super) fn is_unchanged(&self, committed: &Header) -> bool {
        let bitmaps_are = !self.bitmaps.is_changed() && self.dirty_ranges().is_empty();
        self.metadata_is_unchanged() && bitmaps_are && self.header == *committed
    }

    fn metadata_is_unchanged(&self) -> bool {
        self.tables.is_empty() && self.frozen.is_empty() && !self.l1_changed && self.refcounts.is_unchanged()
    }

    /// Writes all pending metadata to clusters that the committed state does not use. A commit that will settle keeps off
    /// the places where things will lie in the end.
    pub(super) fn write_metadata(&mut self, settle: bool) -> Result<Prepared, Error> {
        if self.cut_tail {
            self.refcounts.drop_empty_blocks()?;
        }
        self.refcounts.fit_table()?;
        if self.metadata_is_unchanged() {
            return Ok(Prepared { header: self.header_with(&Moves::default()), lasting: None });
        }
        let lasting = settle.then(|| (self.refcounts.clone(), self.host_end()));
        if settle {
            let start = self.start_of_copies()?;
            self.refcounts.begin_at(start);
        }
        let moves = self.make_way(settle)?;
        self.write_structures(&moves, |_| true)?;
        let header = self.header_with(&moves);
        Ok(Prepared { header, lasting: lasting.map(|(refcounts, written)| Lasting { refcounts, moves, written }) })
    }

    /// Where the copies begin that last until a commit has settled: after the file's end, or after the last cluster in use of a
    /// device, which cannot grow.
    fn start_of_copies(&mut self) -> Result<u64, Error> {
        let bits = self.header.cluster_bits;
        let end = bits.clusters_for(self.host_end()).max(self.refcounts.end_of_taken());
        let grows = self.file().storage.set_size((end + 1) << bits.bits()).is_ok();
        if grows { Ok(end) } else { self.refcounts.end() }
    }

    /// Writes what the commit moved to its lasting place, which is free since; returns the header that refers to it, and the
    /// end of the settled file.
    pub(super) fn write_settled(&mut self, lasting: Lasting) -> Result<(Header, u64), Error> {
        self.refcounts = lasting.refcounts;
        let end = self.write_structures(&Moves::default(), |home| lasting.moves.0.contains_key(&home))?;
        let bits = self.header.cluster_bits.bits();
        let end = if self.cut_tail { self.refcounts.end()? << bits } else { end.max(lasting.written) };
        Ok((self.header_with(&Moves::default()), end))
    }

    /// Finds other places for what must not be overwritten yet; with `all`, for everything that refers to such places too.
    fn make_way(&mut self, all: bool) -> Result<Moves, Error> {
        let bits = self.header.cluster_bits;
        let mut moves = Moves::default();
        let in_use = |home: &HostCluster| !self.refcounts.is_ours(*home);
        let homes: Vec<HostCluster> = self.changed_tables().map(|(home, _)| home).filter(in_use).collect();
        for home in homes {
            moves.0.insert(home, self.refcounts.move_run(home.0..home.0 + 1)?);
        }
        let tables_moved = !moves.0.is_empty();
        for (&at, structure) in &self.pointing {
            if all || !self.refcounts.is_ours(at) {
                let run = at.0..at.0 + bits.clusters_for(structure.bytes.len() as u64);
                moves.0.insert(at, self.refcounts.move_run(run)?);
            }
        }
        self.l1_changed |= tables_moved;
        let l1 = self.clusters(self.header.l1_table, u64::from(self.header.l1_size) * 8);
        if self.l1_changed && !l1.is_empty() && (all || !self.refcounts.is_ours(HostCluster(l1.start))) {
            moves.0.insert(HostCluster(l1.start), self.refcounts.move_run(l1)?);
        }
        self.refcounts.move_away(all)?;
        Ok(moves)
    }

    /// The changed L2 tables with their lasting places.
    fn changed_tables(&self) -> impl Iterator<Item = (HostCluster, &[L2Entry])> {
        let own = self.tables.iter().filter_map(|(&index, table)| Some((self.table_home(index)?, &*table.entries)));
        own.chain(self.frozen.iter().map(|(&home, entries)| (home, &**entries)))
    }

    /// Writes everything that has changed to its place, or where it was moved; L2 tables as `chosen` says. Returns where the
    /// last structure ends.
    fn write_structures(&self, moves: &Moves, chosen: impl Fn(HostCluster) -> bool) -> Result<u64, Error> {
        let bits = self.header.cluster_bits;
        let to = |offset: HostOffset| moves.of(self, offset);
        let mut end = 0;
        let mut write = |bytes: &[u8], offset: HostOffset| {
            end = end.max(offset.0 + bytes.len() as u64);
            self.file().write(bytes, offset)
        };
        for (home, entries) in self.changed_tables().filter(|&(home, _)| chosen(home)) {
            write(&self.header.l2_format().encode(entries), to(bits.host_offset(home)))?;
        }
        if self.l1_changed {
            write(&table_bytes(self.l1.iter().map(|entry| entry.with_table(to).0)), to(self.header.l1_table))?;
        }
        for (&at, structure) in &self.pointing {
            write(&structure.bytes_with(to), to(bits.host_offset(at)))?;
        }
        let in_clusters = self.changed_tables().map(|(home, _)| to(bits.host_offset(home)).0 + bits.size()).max();
        Ok(end.max(in_clusters.unwrap_or(0)).max(self.refcounts.write()?))
    }

    fn header_with(&self, moves: &Moves) -> Header {
        let bits = self.header.cluster_bits;
        let table = self.refcounts.table_run();
        let mut header = Header {
            l1_table: moves.of(self, self.header.l1_table),
            snapshot_table: moves.of(self, self.header.snapshot_table),
            refcount_table: bits.host_offset(HostCluster(table.start)),
            refcount_table_clusters: u32::try_from(table.end - table.start).unwrap_or(u32::MAX),
            ..self.header.clone()
        };
        header.features.autoclear &= features::KNOWN_AUTOCLEAR;
        if header.extension(extension::BITMAPS).is_none() {
            header.features.autoclear &= !features::BITMAPS;
        }
        header
    }
}

impl Moves {
    fn of(&self, state: &State, offset: HostOffset) -> HostOffset {
        let bits = state.header.cluster_bits;
        self.0.get(&bits.host_cluster(offset)).map_or(offset, |&to| bits.host_offset(to))
    }
}

impl Pointing {
    /// The content with the places that structures have by `to`.
    fn bytes_with(&self, to: impl Fn(HostOffset) -> HostOffset) -> Vec<u8> {
        if let Place::SnapshotTable = self.place {
            let mut bytes = self.bytes.clone();
            for at in snapshot::entry_starts(&self.bytes) {
                if let Some(field) = bytes.get_mut(at..at + 8).and_then(|field| <&mut [u8; 8]>::try_from(field).ok()) {
                    *field = to(HostOffset(u64::from_be_bytes(*field))).0.to_be_bytes();
                }
            }
            return bytes;
        }
        table_bytes(words(&self.bytes).map(|word| L1Entry(word).with_table(&to).0))
    }
}

/// Refuses what must not be written, saying why.
pub(super) fn check_writable(layer: &crate::Layer, has_backing: bool) -> Result<(), Error> {
    let header = layer.header();
    layer.data_file()?;
    let incompatible = header.features.incompatible;
    let obstacle = if incompatible & features::CORRUPT != 0 {
        WriteObstacle::MarkedCorrupt
    } else if incompatible & features::DIRTY != 0 {
        WriteObstacle::Dirty
    } else if header.backing_name.is_some() != has_backing {
        WriteObstacle::BackingMismatch
    } else if layer.l1().iter().any(|entry| entry.reserved_bits() != 0) {
        let problem = "an entry has reserved bits set";
        return Err(layer.file().corrupt(Corruption::Malformed { place: Place::L1Table, problem }));
    } else {
        return Ok(());
    };
    Err(Error::NotWritable { image: layer.name().to_owned(), obstacle })
}
