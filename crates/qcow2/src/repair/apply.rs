use std::collections::BTreeMap;
use std::sync::Arc;

use qtk_block::BlockRead;

use super::draft::Draft;
use super::rebuild::rebuild;
use super::users::users;
use crate::check::{Checker, Claims, Fix};
use crate::entry::L1Entry;
use crate::error::{Action, Corruption, Error, Place};
use crate::file::{ImageFile, table_bytes};
use crate::header::Header;
use crate::layer::Layer;
use crate::snapshot;
use crate::transaction::{HeaderArea, replace_header};
use crate::types::{HostCluster, HostOffset};

/// Brings a draft of `layer`'s file, whose header is `header`, into the file.
///
/// What the draft changes within the file may be in use. A first header therefore leads to copies of it beyond the file's
/// end: then its own places are free to be written, and a second header leads back to them. A device that cannot grow must have
/// room after `in_use`, where its last cluster in use ends.
pub(super) fn apply(
    layer: &Layer,
    draft: &Arc<Draft>,
    header: &Header,
    claims: &Claims,
    in_use: u64,
) -> Result<(), Error> {
    let file = layer.file();
    let old = layer.header();
    let changed = draft.changed();
    if changed.is_empty() && header == old && draft.size() == file.storage.size() {
        return Ok(());
    }
    let committed = HeaderArea::read(file, old)?;
    if Header::read_damaged(file)? != *old {
        return Err(Error::ChangedMeanwhile { image: layer.name().to_owned() });
    }
    let old_size = file.storage.size();
    let detour_beyond = |free: u64| match changed.first() {
        Some(&first) if first < free => Detour::plan(file, draft, header, claims, free).map(Some),
        _ => Ok(None),
    };
    let mut free = header.cluster_bits.clusters_for(old_size);
    let mut detour = detour_beyond(free)?;
    let needed = detour.as_ref().map_or(draft.size(), |detour| detour.draft.size());
    if needed > old_size && file.storage.set_size(needed).is_err() {
        free = free.min(header.cluster_bits.clusters_for(in_use));
        detour = detour_beyond(free)?;
    }
    let first_header = detour.as_ref().map_or(header, |detour| &detour.header);
    let write_beyond = || {
        write(draft, file, free..u64::MAX)?;
        detour.as_ref().map_or(Ok(()), |detour| write(&detour.draft, file, free..u64::MAX))?;
        file.sync()?;
        replace_header(file, &committed, old, first_header)
    };
    let area = write_beyond().inspect_err(|_| {
        if committed.is_current(file).unwrap_or(false) && file.storage.size() > old_size {
            // What failed is the error to report. A longer file is the same image.
            let _ = file.storage.set_size(old_size);
        }
    })?;
    if detour.is_some() {
        write(draft, file, 0..free)?;
        file.sync()?;
        replace_header(file, &area, first_header, header)?;
    }
    if file.storage.size() != draft.size() {
        file.set_size(draft.size())?;
        file.sync()?;
    }
    Ok(())
}

fn write(draft: &Draft, file: &ImageFile, clusters: std::ops::Range<u64>) -> Result<(), Error> {
    draft.write_to(&*file.storage, clusters).map_err(|source| Error::Io {
        image: file.name.to_string(),
        action: Action::Write,
        offset: 0,
        len: draft.size(),
        source,
    })
}

/// The draft's image with everything that it changes before the first free cluster copied beyond that.
struct Detour {
    draft: Arc<Draft>,
    header: Header,
}

impl Detour {
    fn plan(file: &ImageFile, target: &Arc<Draft>, header: &Header, claims: &Claims, free: u64) -> Result<Self, Error> {
        let draft = Arc::new(Draft::new(target.clone(), header.cluster_bits));
        let detour_file = ImageFile { storage: draft.clone(), name: file.name.clone() };
        let wanted = header;
        let mut header = header.clone();
        let next = target.changed().last().map_or(free, |last| free.max(last + 1));
        let mut planner = Planner { target, free, claims, file: &detour_file, next, tables: BTreeMap::new() };
        planner.redirect(&mut header)?;
        let next = HostCluster(planner.next);
        // Counting everything but the refcounts themselves tells what is still in use.
        header.refcount_table_clusters = 0;
        let mut unheard = |_: &_| {};
        let mut checker = Checker::new(detour_file.clone(), header.clone(), Fix::Nothing, &mut unheard)?;
        checker.begin()?;
        checker.count_references()?;
        for cluster in target.changed().into_iter().map(HostCluster).take_while(|cluster| cluster.0 < free) {
            if checker.counts.get(cluster) != 0 {
                return Err(overlap(target, file, wanted, cluster)?);
            }
        }
        rebuild(&detour_file, &mut header, &mut checker.counts, claims, next)?;
        Ok(Self { draft, header })
    }
}

/// The error that `cluster` cannot change for one of its users without changing for the other.
fn overlap(target: &Arc<Draft>, file: &ImageFile, header: &Header, cluster: HostCluster) -> Result<Error, Error> {
    let file = ImageFile { storage: target.clone(), name: file.name.clone() };
    let mut unheard = |_: &_| {};
    let mut checker = Checker::new(file, header.clone(), Fix::Nothing, &mut unheard)?;
    checker.begin()?;
    let users = users(&checker, cluster)?;
    let (first, second) = (users.first().copied(), users.last().copied());
    let offset = header.cluster_bits.host_offset(cluster);
    let place = |found: Option<Place>| found.unwrap_or(Place::Header);
    Ok(checker.file.corrupt(Corruption::Overlap { first: place(first), second: place(second), offset }))
}

/// Copies metadata beyond the end of the file, with everything that refers to it.
struct Planner<'a> {
    target: &'a Draft,
    free: u64,
    claims: &'a Claims,
    file: &'a ImageFile,
    /// The first cluster beyond everything.
    next: u64,
    /// L2 tables that have moved, and where to.
    tables: BTreeMap<HostOffset, HostOffset>,
}

impl Planner<'_> {
    fn redirect(&mut self, header: &mut Header) -> Result<(), Error> {
        let mut unheard = |_: &_| {};
        let mut checker = Checker::new(self.file.clone(), header.clone(), Fix::Nothing, &mut unheard)?;
        checker.begin()?;
        let mut snapshots = std::mem::take(&mut checker.snapshots);
        let mut moved = false;
        if let Some(l1) = self.l1_table(&checker, header.l1_table, header.l1_size)? {
            header.l1_table = l1;
        }
        for entry in &mut snapshots.entries {
            let snapshot = &mut entry.snapshot;
            let sound = header.cluster_bits.offset_within(snapshot.l1_table.0) == 0
                && u64::from(snapshot.l1_size) <= crate::header::MAX_L1_SIZE / 8;
            if sound && let Some(l1) = self.l1_table(&checker, snapshot.l1_table, snapshot.l1_size)? {
                snapshot.l1_table = l1;
                moved = true;
            }
        }
        if moved || self.is_changed(header.cluster_bits, header.snapshot_table, snapshots.len) {
            let table = snapshot::encode(&snapshots.entries, header.size).unwrap_or_default();
            header.snapshot_table = self.put(header.cluster_bits, table)?;
        }
        Ok(())
    }

    /// Whether the draft changes part of a range within the file.
    fn is_changed(&self, bits: crate::ClusterBits, offset: HostOffset, len: u64) -> bool {
        let first = bits.host_cluster(offset).0;
        let end = first.saturating_add(bits.clusters_for(len)).min(self.free);
        (first..end).any(|cluster| self.target.is_changed(cluster))
    }

    /// Moves an L1 table if it or one of its L2 tables changes within the file.
    fn l1_table(&mut self, checker: &Checker<'_>, offset: HostOffset, size: u32) -> Result<Option<HostOffset>, Error> {
        let bits = checker.header.cluster_bits;
        let mut entries = checker.read_l1(offset, size)?;
        let mut moved = self.is_changed(bits, offset, u64::from(size) * 8);
        for entry in &mut entries {
            let table = entry.offset();
            if bits.offset_within(table.0) != 0 || !self.is_changed(bits, table, bits.size()) {
                continue;
            }
            let copy = match self.tables.get(&table) {
                Some(&copy) => copy,
                None => {
                    let mut bytes = vec![0; bits.buffer_len()];
                    self.file.read_padded(&mut bytes, table)?;
                    let copy = self.put(bits, bytes)?;
                    self.tables.insert(table, copy);
                    copy
                }
            };
            *entry = L1Entry(entry.0 & !table.0 | copy.0);
            moved = true;
        }
        if !moved {
            return Ok(None);
        }
        self.put(bits, table_bytes(entries.iter().map(|entry| entry.0))).map(Some)
    }

    /// Stores a structure beyond everything.
    fn put(&mut self, bits: crate::ClusterBits, mut bytes: Vec<u8>) -> Result<HostOffset, Error> {
        bytes.resize(bytes.len().next_multiple_of(bits.buffer_len()), 0);
        let count = bits.clusters_for(bytes.len() as u64);
        let start = self.claims.skip(self.next, count);
        self.next = start + count;
        let offset = bits.host_offset(HostCluster(start));
        self.file.write(&bytes, offset)?;
        Ok(offset)
    }
}
