use std::io;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::{BlockRead, Extent, ExtentKind};
use qtk_qcow2::{Mapping, MappingKind};

use crate::{ChainLayer, Error};

/// Layers on top of each other, read as one device. The first one is on top; what none of them holds is zero.
#[derive(Clone, Debug)]
pub struct Chain {
    layers: Arc<[ChainLayer]>,
    top: usize,
    end: usize,
}

/// A run of a chain that one layer stores in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Byte range on the guest's disk.
    pub range: Range<u64>,
    /// The layer it was found in, counted from the top. For an unallocated run the lowest layer that reaches so far.
    pub depth: usize,
    /// How that layer stores it.
    pub kind: MappingKind,
}

impl Chain {
    pub(crate) fn new(layers: Vec<ChainLayer>) -> Self {
        Self { top: 0, end: layers.len(), layers: layers.into() }
    }

    /// The layers, topmost first.
    #[must_use]
    pub fn layers(&self) -> &[ChainLayer] {
        &self.layers[self.top..self.end]
    }

    /// The topmost layer that was opened by name. What lies above is the log of an unfinished transaction on it.
    pub(crate) fn named(&self) -> Option<&ChainLayer> {
        self.layers().iter().find(|layer| !layer.is_log())
    }

    /// The chain from the layer at `depth` down, which must be there.
    pub(crate) fn from(&self, depth: usize) -> Self {
        Self { top: (self.top + depth).min(self.end), ..self.clone() }
    }

    /// The layers above the one at `depth`, as if there were no others.
    pub(crate) fn above(&self, depth: usize) -> Self {
        Self { end: self.end.min(self.top + depth), ..self.clone() }
    }

    /// The chain that the topmost layer lies on, if any.
    #[must_use]
    pub fn beneath(&self) -> Option<Self> {
        (self.top + 1 < self.end).then(|| self.from(1))
    }

    /// All runs of `range`, which must lie on the device.
    #[must_use]
    pub fn runs(&self, range: Range<u64>) -> Runs<'_> {
        Runs { layers: self.layers(), range, found: vec![None; self.layers().len()] }
    }

    fn checked(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        let end = offset.checked_add(len).filter(|&end| end <= self.size());
        end.map(|end| offset..end).ok_or_else(|| {
            let size = self.size();
            let problem = format!("{len} bytes at offset {offset} reach past the end of a disk of {size} bytes");
            io::Error::new(io::ErrorKind::UnexpectedEof, problem)
        })
    }

    /// The front of a range as it is to be read. A single one is found without the memory that an iteration needs.
    fn front(&self, range: Range<u64>) -> Result<Run, Error> {
        let at = range.start;
        descend(self.layers(), range, |depth, end| {
            let layer = &self.layers()[depth];
            layer.place(at..end.min(layer.size()))
        })
    }

    pub(crate) fn read_run(&self, buf: &mut [u8], run: &Run) -> Result<(), Error> {
        let layer = &self.layers()[run.depth];
        layer.read_run(buf, run.range.start, run.kind).map_err(|source| Error::Read {
            path: layer.path().to_owned(),
            offset: run.range.start,
            source,
        })
    }
}

impl BlockRead for Chain {
    fn size(&self) -> u64 {
        self.layers().first().map_or(0, ChainLayer::size)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = self.checked(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let front = self.front(range.clone())?;
        let (part, mut rest) = buf.split_at_mut(in_memory(front.range.end - front.range.start));
        self.read_run(part, &front)?;
        if rest.is_empty() {
            return Ok(());
        }
        for run in self.runs(front.range.end..range.end) {
            let run = run?;
            let (part, tail) = rest.split_at_mut(in_memory(run.range.end - run.range.start));
            self.read_run(part, &run)?;
            rest = tail;
        }
        Ok(())
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let start = range.start;
        let mut runs = self.runs(range);
        let Some(first) = runs.next() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an extent must not be empty"));
        };
        let first = first?;
        // The layers above hide the difference between a zero that is stored and one that nobody stored.
        let is_data = |kind: MappingKind| kind.extent_kind() == ExtentKind::Data;
        let kind = if is_data(first.kind) { ExtentKind::Data } else { ExtentKind::Zero };
        let same = runs.map_while(Result::ok).take_while(|run| is_data(run.kind) == is_data(first.kind));
        let end = same.last().map_or(first.range.end, |run| run.range.end);
        Ok(Extent { range: start..end, kind })
    }
}

/// The runs of a range of a chain, in order. Looks at each table of each layer once.
#[derive(Debug)]
pub struct Runs<'a> {
    layers: &'a [ChainLayer],
    range: Range<u64>,
    /// The last mapping asked of each layer.
    found: Vec<Option<Mapping>>,
}

impl Runs<'_> {
    /// Goes on at `offset`, which may lie within the last run.
    pub fn seek(&mut self, offset: u64) {
        self.range.start = offset.min(self.range.end);
    }

    fn mapping(&mut self, depth: usize, end: u64) -> Result<Mapping, Error> {
        let at = self.range.start;
        let known = self.found[depth].take().filter(|mapping| mapping.range.contains(&at));
        let mapping = match known {
            Some(mapping) => mapping,
            // Asked for as much as the iteration can use, so that the answer serves many runs of the layers beneath.
            None => self.layers[depth].mapping(at..self.range.end.min(self.layers[depth].size()))?,
        };
        let run = Mapping { range: at..mapping.range.end.min(end), kind: mapping.kind.skip(at - mapping.range.start) };
        self.found[depth] = Some(mapping);
        Ok(run)
    }

    fn find(&mut self) -> Result<Run, Error> {
        descend(self.layers, self.range.clone(), |depth, end| self.mapping(depth, end))
    }
}

/// Goes down through the layers to the one that holds the front of a range. `mapping` tells how a layer stores it, up to an end.
fn descend(
    layers: &[ChainLayer],
    range: Range<u64>,
    mut mapping: impl FnMut(usize, u64) -> Result<Mapping, Error>,
) -> Result<Run, Error> {
    let mut end = range.end;
    let mut depth = 0;
    loop {
        let found = mapping(depth, end)?;
        end = found.range.end;
        let beneath = layers.get(depth + 1).is_some_and(|layer| layer.size() > range.start);
        if found.kind != MappingKind::Unallocated || !beneath {
            return Ok(Run { range: found.range, depth, kind: found.kind });
        }
        depth += 1;
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.range.is_empty() {
            return None;
        }
        let run = self.find();
        self.range.start = match &run {
            Ok(run) => run.range.end,
            Err(_) => self.range.end,
        };
        Some(run)
    }
}

/// A length within a buffer that is in memory already.
pub(crate) fn in_memory(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
