use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use qtk_block::{BlockRead, ExtentKind, RawFile};
use qtk_qcow2::MappingKind;

use crate::chain::{Run, in_memory};
use crate::layer::SECTOR;
use crate::status::{Status, Statuses};
use crate::{Chain, ChainLayer, Error, Image};

use super::unit::Origin;

/// The disks of several images, one after the other, read as one.
#[derive(Debug)]
pub(crate) struct Disk {
    parts: Vec<Part>,
    size: u64,
    /// Whether what the images lie on is left to what the target lies on.
    overlay: bool,
    /// Where that ends, if it is known. Zeroes past it need not be written.
    end_beneath: Option<u64>,
}

#[derive(Debug)]
struct Part {
    chain: Chain,
    /// Where it begins on the concatenated disk.
    start: u64,
    /// What is read of the image.
    window: Range<u64>,
    /// Layers that make up the topmost image: one, or two where the log of an unfinished transaction lies on it.
    own_layers: usize,
}

impl Part {
    /// What the image is called.
    fn path(&self) -> PathBuf {
        self.chain.layers().first().map_or_else(PathBuf::new, |layer| layer.path().to_owned())
    }
}

/// What a stretch of the disk is to the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Bytes that must be read.
    Data,
    /// Zeroes.
    Zero,
    /// Left to what the target lies on.
    Backing,
}

/// A run of one image on the concatenated disk.
#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    /// Bytes of the concatenated disk.
    pub(crate) range: Range<u64>,
    pub(crate) class: Class,
    part: usize,
    /// None where it could not be found out how the stretch is stored.
    run: Option<Run>,
}

impl Stretch {
    /// The part of it in `range`, which must lie in it.
    pub(crate) fn cut(&self, range: Range<u64>) -> Self {
        let skipped = range.start - self.range.start;
        let run = self.run.as_ref().map(|run| {
            let start = run.range.start + skipped;
            Run { range: start..start + (range.end - range.start), depth: run.depth, kind: run.kind.skip(skipped) }
        });
        Self { range, class: self.class, part: self.part, run }
    }

    /// The part of it around `at` that is needed, or the one that lies in `unused`, which is zero then.
    pub(crate) fn part(&self, at: u64, unused: &[Range<u64>]) -> Self {
        if self.class != Class::Data {
            return self.clone();
        }
        let next = unused.partition_point(|range| range.end <= at);
        let start = next.checked_sub(1).map_or(0, |before| unused[before].end).max(self.range.start);
        let end = self.range.end;
        match unused.get(next) {
            Some(range) if range.start <= at => {
                Self { class: Class::Zero, ..self.cut(range.start.max(start)..range.end.min(end)) }
            }
            Some(range) => self.cut(start..range.start.min(end)),
            None => self.cut(start..end),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether its bytes lie in a file as they are.
    pub(crate) fn is_plain(&self) -> bool {
        self.run.as_ref().is_some_and(|run| matches!(run.kind, MappingKind::Data { .. }))
    }

    /// Where the stretch's compressed cluster lies.
    pub(crate) fn origin(&self) -> Option<Origin> {
        let run = self.run.as_ref()?;
        match run.kind {
            MappingKind::Compressed { host, len } => {
                Some(Origin { layer: (self.part, run.depth), range: host.0..host.0 + len })
            }
            _ => None,
        }
    }
}

impl Disk {
    /// The file that a stretch lies in as it is, if there is one, and where.
    pub(crate) fn plain_place(&self, stretch: &Stretch) -> Option<(&Arc<RawFile>, u64)> {
        let run = stretch.run.as_ref()?;
        match run.kind {
            MappingKind::Data { host } => Some((self.layer((stretch.part, run.depth)).data_file(), host.0)),
            _ => None,
        }
    }

    pub(crate) fn new(sources: &[Image], overlay: bool) -> Self {
        let mut disk = Self { parts: Vec::new(), size: 0, overlay, end_beneath: None };
        sources.iter().for_each(|image| disk.push(image, 0..image.size()));
        disk
    }

    /// A part of one image.
    pub(crate) fn window(source: &Image, window: Range<u64>) -> Self {
        let mut disk = Self { parts: Vec::new(), size: 0, overlay: false, end_beneath: None };
        disk.push(source, window);
        disk
    }

    /// Says how large that is what the target lies on.
    pub(crate) fn lies_on(&mut self, size: Option<u64>) {
        self.end_beneath = size;
    }

    fn push(&mut self, image: &Image, window: Range<u64>) {
        let start = self.size;
        self.size = (start + (window.end - window.start)).next_multiple_of(SECTOR);
        let logs = image.layers().iter().take_while(|layer| layer.is_log()).count();
        self.parts.push(Part { chain: image.chain().clone(), start, window, own_layers: logs + 1 });
    }

    /// A layer of an image.
    pub(crate) fn layer(&self, (part, depth): (usize, usize)) -> &ChainLayer {
        &self.parts[part].chain.layers()[depth]
    }

    /// All stretches, in order.
    pub(crate) fn stretches(&self) -> Stretches<'_> {
        Stretches { disk: self, part: 0, runs: None, at: 0 }
    }

    /// The next data behind a compressed cluster, if the layer that holds that comes to it next as well: it is another
    /// compressed cluster then, and what lies between them holds no data, not even data that others hide.
    pub(crate) fn next_of_layer(&self, stretch: &Stretch) -> Option<Stretch> {
        let run = stretch.run.as_ref()?;
        let mut behind = self.stretches_from(stretch.range.end).map_while(Result::ok);
        let next = behind.find(|next| next.class == Class::Data)?;
        let origin = next.origin().filter(|origin| origin.layer == (stretch.part, run.depth))?;
        let (layer, end) = (self.layer(origin.layer), next.run.as_ref()?.range.start);
        let mut at = run.range.end;
        while at < end {
            let between = layer.mapping(at..end).ok()?;
            if between.kind.extent_kind() == ExtentKind::Data {
                return None;
            }
            at = between.range.end;
        }
        Some(next)
    }

    fn stretches_from(&self, offset: u64) -> Stretches<'_> {
        let index = self.part_index(offset).unwrap_or(self.parts.len());
        let runs = self.parts.get(index).map(|part| {
            let start = part.window.start + (offset - part.start);
            Statuses::new(&part.chain, start.min(part.window.end)..part.window.end)
        });
        Stretches { disk: self, part: index, runs, at: offset }
    }

    /// Fills `buf`, which is as long, with a stretch's content.
    pub(crate) fn read_stretch(&self, buf: &mut [u8], stretch: &Stretch) -> Result<(), Error> {
        match &stretch.run {
            Some(run) => self.parts[stretch.part].chain.read_run(buf, run),
            None => self.read_at(buf, stretch.range.start).map_err(|source| Error::Read {
                path: self.parts[stretch.part].path(),
                offset: stretch.range.start,
                source,
            }),
        }
    }

    fn class(&self, part: &Part, run: &Run, is_hole: bool, start: u64) -> Class {
        if self.end_beneath.is_some_and(|end| start >= end) && run.kind.extent_kind() != ExtentKind::Data {
            return Class::Backing;
        }
        match run.kind {
            MappingKind::Unallocated if !self.overlay => Class::Zero,
            // Past the end of what the image lies on.
            MappingKind::Unallocated if run.depth < part.own_layers => Class::Zero,
            _ if self.overlay && run.depth >= part.own_layers => Class::Backing,
            MappingKind::Data { .. } if is_hole => Class::Zero,
            MappingKind::Data { .. } | MappingKind::Compressed { .. } => Class::Data,
            MappingKind::Zero { .. } | MappingKind::Unallocated => Class::Zero,
        }
    }

    /// What lies between the end of a part and the next whole sector.
    fn padding(&self, index: usize, part: &Part) -> Option<Stretch> {
        let start = part.start + (part.window.end - part.window.start);
        let range = start..start.next_multiple_of(SECTOR);
        (!range.is_empty()).then_some(Stretch { range, class: Class::Zero, part: index, run: None })
    }

    fn part_index(&self, offset: u64) -> Option<usize> {
        // Empty images share their start with the next one.
        self.parts.partition_point(|part| part.start <= offset).checked_sub(1)
    }

    fn part_at(&self, offset: u64) -> Option<&Part> {
        self.parts.get(self.part_index(offset)?)
    }
}

impl BlockRead for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let Some(part) = self.part_at(at) else { return Err(io::ErrorKind::UnexpectedEof.into()) };
            let within = part.window.start + (at - part.start);
            let len = in_memory(part.window.end.saturating_sub(within)).min(rest.len());
            if len == 0 {
                let padding = rest.len().min(in_memory(at.next_multiple_of(SECTOR) - at));
                if padding == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                rest[..padding].fill(0);
                (rest, at) = (&mut rest[padding..], at + padding as u64);
                continue;
            }
            let (head, tail) = rest.split_at_mut(len);
            part.chain.read_at(head, within)?;
            (rest, at) = (tail, at + len as u64);
        }
        Ok(())
    }
}

/// The stretches of a disk, in order.
#[derive(Debug)]
pub(crate) struct Stretches<'a> {
    disk: &'a Disk,
    part: usize,
    runs: Option<Statuses<'a>>,
    /// The end of the last stretch.
    at: u64,
}

impl Iterator for Stretches<'_> {
    type Item = Result<Stretch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (index, part) = (self.part, self.disk.parts.get(self.part)?);
            let runs = self.runs.get_or_insert_with(|| Statuses::new(&part.chain, part.window.clone()));
            let Some(status) = runs.next() else {
                (self.part, self.runs) = (index + 1, None);
                self.at = self.disk.parts.get(self.part).map_or(self.disk.size, |next| next.start);
                match self.disk.padding(index, part) {
                    Some(padding) => return Some(Ok(padding)),
                    None => continue,
                }
            };
            let stretch = status.map(|Status { mut run, is_hole, .. }| {
                let start = part.start + (run.range.start - part.window.start);
                let mut range = start..start + (run.range.end - run.range.start);
                if let Some(end) = self.disk.end_beneath.filter(|end| range.start < *end && *end < range.end) {
                    run.range.end -= range.end - end;
                    range.end = end;
                    runs.seek(run.range.end);
                }
                self.at = range.end;
                Stretch { class: self.disk.class(part, &run, is_hole, range.start), range, part: index, run: Some(run) }
            });
            return Some(stretch.map_err(|source| Error::Status {
                path: part.path(),
                offset: self.at,
                source: Box::new(source),
            }));
        }
    }
}

impl Stretches<'_> {
    /// After an error, the sector that it was found at, as data; what follows comes next.
    pub(crate) fn pass_over(&mut self) -> Option<Stretch> {
        let (index, part) = (self.part, self.disk.parts.get(self.part)?);
        let range = self.at..(self.at + SECTOR).min(part.start + (part.window.end - part.window.start));
        self.at = range.end;
        self.runs.as_mut()?.seek(part.window.start + (range.end - part.start));
        Some(Stretch { range, class: Class::Data, part: index, run: None })
    }
}
