use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use qtk_block::{is_zero, read_padded};
use qtk_qcow2::{ClusterBits, CompressionType};

use crate::Error;
use crate::chain::in_memory;
use crate::layer::SECTOR;

use super::ConvertWarning;
use super::copy::Shape;
use super::disk::{Class, Disk, Stretch};
use super::once::digest;
use super::pack::Packer;
use super::plan::{Chunk, Job, Zeroes};
use super::twin::Twin;
use super::unit::{Origin, Piece, Unit};

/// How the target stores what is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Any sectors by themselves.
    Sectors,
    /// Any sectors, with the rest of the cluster of so many bytes that they lie in, which costs no more.
    Padded(u64),
    /// Whole clusters or subclusters of so many bytes: what a piece leaves out of one is filled up here.
    Whole(u64),
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    pub(crate) cluster_bits: ClusterBits,
    pub(crate) compression: CompressionType,
    pub(crate) level: Option<i32>,
    /// Whether clusters that are compressed so already are copied.
    pub(crate) copies: bool,
}

/// Reads units and makes of them what the target stores. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Filler<'a> {
    pub(crate) disk: &'a Disk,
    pub(crate) output: &'a Path,
    pub(crate) shape: &'a Shape,
    pub(crate) salvage: bool,
    /// What nobody needs of the disk.
    pub(crate) unused: &'a [Range<u64>],
    /// Units whose buffers can be used again.
    pub(crate) spare: Mutex<Vec<Unit>>,
}

/// What a part of a unit is, after the search for zeroes.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) bytes: Range<usize>,
    pub(super) content: Content,
    /// Whether a request ends with it.
    ends: bool,
}

impl Part {
    /// What of it lies in a cluster.
    pub(super) fn within(&self, cluster: &Range<usize>) -> Range<usize> {
        cluster.start.max(self.bytes.start)..cluster.end.min(self.bytes.end)
    }
}

#[derive(Clone, Debug)]
pub(super) enum Content {
    Data,
    Zero,
    Backing,
    /// A whole cluster, compressed as the target wants it.
    Copied(Stretch, Origin),
}

impl Filler<'_> {
    pub(crate) fn packer(&self) -> Result<Option<Packer>, Error> {
        let failed = |source| Error::Codec { path: self.output.to_owned(), source };
        self.shape.packing.map(Packer::new).transpose().map_err(failed)
    }

    pub(crate) fn fill(&self, mut packer: Option<&mut Packer>, job: Job) -> Result<Unit, Error> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut unit = spare.unwrap_or_default();
        match job {
            Job::Zero(range) => unit.reset_to_zero(range),
            Job::Fill(chunks) => {
                let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(unit) };
                let range = first.stretch.range.start..last.stretch.range.end;
                let padding = match (self.shape.packing, self.shape.grain) {
                    (Some(packing), _) => packing.cluster_bits.size(),
                    (None, Grain::Whole(grain)) => grain,
                    (None, Grain::Sectors | Grain::Padded(_)) => 1,
                };
                if let Some(packer) = &mut packer {
                    packer.lend(&mut unit);
                }
                unit.reset(range, padding, packer.is_some());
                let parts = self.read(&mut unit, chunks)?;
                match (self.shape.grain, packer) {
                    (_, Some(packer)) => self.pack(&mut unit, &parts, packer)?,
                    (Grain::Whole(grain), None) => self.assemble(&mut unit, &parts, grain)?,
                    (Grain::Sectors, None) => self.list(&mut unit, &parts, SECTOR),
                    (Grain::Padded(cluster), None) => self.list(&mut unit, &parts, cluster),
                }
            }
        }
        Ok(unit)
    }

    /// Reads what must be read, and says what each part of the unit is.
    fn read(&self, unit: &mut Unit, chunks: Vec<Chunk>) -> Result<Vec<Part>, Error> {
        let mut parts: Vec<Part> = Vec::new();
        for Chunk { stretch, ends, problem, unseen } in chunks {
            if let Some(source) = problem {
                let warning = ConvertWarning::NoStatus { offset: stretch.range.start, source };
                unit.warnings.push(warning);
            }
            if unseen {
                let bytes = unit.positions(&stretch.range);
                self.add_twin(unit, bytes.clone(), &stretch, false);
                add_part(&mut parts, bytes, Content::Data);
            } else {
                self.read_chunk(unit, &mut parts, &stretch)?;
            }
            if let Some(last) = parts.last_mut() {
                last.ends = ends;
            }
        }
        Ok(parts)
    }

    fn read_chunk(&self, unit: &mut Unit, parts: &mut Vec<Part>, stretch: &Stretch) -> Result<(), Error> {
        let bytes = unit.positions(&stretch.range);
        match stretch.class {
            Class::Backing => add_part(parts, bytes, Content::Backing),
            Class::Zero => {
                unit.plain[bytes.clone()].fill(0);
                let content = if self.shape.zeroes == Zeroes::Data { Content::Data } else { Content::Zero };
                add_part(parts, bytes, content);
            }
            Class::Data => {
                if let Some(origin) = self.origin(stretch, unit)? {
                    add_part(parts, bytes, Content::Copied(stretch.clone(), origin));
                    return Ok(());
                }
                self.read_data(unit, bytes.clone(), stretch)?;
                if self.shape.packing.is_some() {
                    // Zero or not counts for whole clusters only.
                    add_part(parts, bytes, Content::Data);
                    return Ok(());
                }
                // What could not be read must not be taken over.
                if !self.salvage {
                    self.add_twin(unit, bytes.clone(), stretch, true);
                }
                let start = bytes.start;
                self.shape.detection.split(&unit.plain[bytes], stretch.range.start, |part, hole| {
                    let bytes = start + part.start..start + part.end;
                    add_part(parts, bytes, if hole { Content::Zero } else { Content::Data });
                });
            }
        }
        Ok(())
    }

    /// Notes where a stretch lies in a file as it is, if it does.
    fn add_twin(&self, unit: &mut Unit, bytes: Range<usize>, stretch: &Stretch, read: bool) {
        if let Some((file, at)) = self.disk.plain_place(stretch) {
            unit.twins.push(Twin { bytes, file: file.clone(), at, read });
        }
    }

    pub(super) fn read_data(&self, unit: &mut Unit, bytes: Range<usize>, stretch: &Stretch) -> Result<(), Error> {
        match self.disk.read_stretch(&mut unit.plain[bytes.clone()], stretch) {
            Err(_) if self.salvage => {}
            result => return result,
        }
        let mut at = stretch.range.start;
        while at < stretch.range.end {
            let sector = stretch.cut(at..stretch.range.end.min(at + SECTOR));
            let bytes = unit.positions(&sector.range);
            let buf = &mut unit.plain[bytes];
            if let Err(error) = self.disk.read_stretch(buf, &sector) {
                buf.fill(0);
                unit.warnings.push(ConvertWarning::Unreadable { offset: at, source: error });
            }
            at = sector.range.end;
        }
        Ok(())
    }

    /// For a target that stores any sectors: data with the rest of its clusters.
    fn list(&self, unit: &mut Unit, parts: &[Part], cluster: u64) {
        let mut end = 0;
        for part in parts {
            match part.content {
                Content::Data => {
                    let start = unit.offset(part.bytes.start) / cluster * cluster;
                    let start = unit.position(start.max(unit.offset(end)));
                    end = unit.position(unit.offset(part.bytes.end).next_multiple_of(cluster).min(unit.range.end));
                    if start < end {
                        unit.pieces.push(Piece::Plain { bytes: start..end });
                    }
                }
                Content::Zero if self.shape.zeroes == Zeroes::Zero => {
                    let range = unit.offset(part.bytes.start)..unit.offset(part.bytes.end);
                    unit.pieces.push(Piece::Zero { range });
                }
                Content::Zero | Content::Backing | Content::Copied(..) => {}
            }
        }
    }

    /// For a target that stores whole clusters or subclusters.
    fn assemble(&self, unit: &mut Unit, parts: &[Part], grain: u64) -> Result<(), Error> {
        let mut rest = parts;
        let mut request_ended = false;
        for start in (0..unit.plain.len()).step_by(in_memory(grain)) {
            let bytes = start..start + in_memory(grain);
            let parts = take_until(&mut rest, bytes.end);
            let begins_request = std::mem::take(&mut request_ended);
            request_ended = parts.iter().any(|part| part.ends && part.bytes.end <= bytes.end);
            let holds = |wanted: fn(&Content) -> bool| parts.iter().any(|part| wanted(&part.content));
            let (data, zero) = (holds(|c| matches!(c, Content::Data)), holds(|c| matches!(c, Content::Zero)));
            let wanted = data || zero && self.shape.zeroes == Zeroes::Zero;
            if !wanted {
                continue;
            }
            let whole_zero = !data && (parts.len() == 1 || self.is_zero_after_first(parts, &bytes, unit)?);
            if whole_zero {
                unit.add_zero(unit.offset(bytes.start)..unit.offset(bytes.end).min(unit.range.end));
                continue;
            }
            for part in parts.iter().filter(|part| !matches!(part.content, Content::Data)) {
                let bytes = part.within(&bytes);
                match part.content {
                    Content::Backing => self.read_beneath(unit, bytes)?,
                    _ => unit.plain[bytes].fill(0),
                }
            }
            if self.shape.contents.is_some() {
                unit.digests.push(digest(&unit.plain[bytes.clone()]));
            }
            unit.add_plain(bytes, begins_request);
        }
        Ok(())
    }

    /// Whether a cluster of the backing is zero once the first part's zeroes are in it. If so, QEMU makes it a zero cluster.
    fn is_zero_after_first(&self, parts: &[Part], cluster: &Range<usize>, unit: &mut Unit) -> Result<bool, Error> {
        self.read_beneath(unit, cluster.clone())?;
        if let Some(first) = parts.iter().find(|part| matches!(part.content, Content::Zero)) {
            unit.plain[first.within(cluster)].fill(0);
        }
        Ok(is_zero(&unit.plain[cluster.clone()]))
    }

    fn read_beneath(&self, unit: &mut Unit, bytes: Range<usize>) -> Result<(), Error> {
        let offset = unit.offset(bytes.start);
        let buf = &mut unit.plain[bytes];
        match &self.shape.beneath {
            Some(beneath) => read_padded(beneath, buf, offset).map_err(read_error(self.output, offset)),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}

pub(super) fn read_error(path: &Path, offset: u64) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Read { path, offset, source }
}

fn add_part(parts: &mut Vec<Part>, bytes: Range<usize>, content: Content) {
    match parts.last_mut() {
        Some(last)
            if !matches!(content, Content::Copied(..))
                && !last.ends
                && std::mem::discriminant(&last.content) == std::mem::discriminant(&content) =>
        {
            last.bytes.end = bytes.end;
        }
        _ => parts.push(Part { bytes, content, ends: false }),
    }
}

/// The parts that begin before `end`; the last of them stays in `rest` if it goes on.
pub(super) fn take_until<'a>(rest: &mut &'a [Part], end: usize) -> &'a [Part] {
    let count = rest.iter().take_while(|part| part.bytes.start < end).count();
    let (taken, _) = rest.split_at(count);
    let done = taken.iter().take_while(|part| part.bytes.end <= end).count();
    *rest = &rest[done..];
    taken
}
