use std::ops::Range;

use qtk_block::BlockRead;

use crate::Error;

use super::disk::{Class, Disk, Stretch, Stretches};

/// Bytes that `qemu-img convert` reads at once, which shows where it looks for zeroes.
pub(crate) const REQUEST: u64 = 2 << 20;

/// What is to be done with a piece of the disk.
#[derive(Debug)]
pub(crate) enum Job {
    /// Write zeroes.
    Zero(Range<u64>),
    /// Read and write.
    Fill(Vec<Chunk>),
}

/// A piece of a stretch. Those of a job follow each other without a gap.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) stretch: Stretch,
    /// Whether `qemu-img` would end a request here.
    pub(crate) ends: bool,
    /// Why it is not known how the stretch is stored.
    pub(crate) problem: Option<Error>,
    /// Whether it is to be copied without a look at it.
    pub(crate) unseen: bool,
}

/// Cuts a disk into jobs, in order. What need not be written is left out.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    stretches: Stretches<'a>,
    current: Option<Stretch>,
    /// Why it is not known how `current` is stored.
    problem: Option<Error>,
    at: u64,
    size: u64,
    rules: Rules,
    /// What nobody needs of the disk.
    unused: &'a [Range<u64>],
    left_out: u64,
}

/// What the target needs to be told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// What jobs begin and end at multiples of where nothing else is said: the target's clusters.
    pub(crate) grain: u64,
    /// Whether jobs can end where a request does, too.
    pub(crate) cuts_anywhere: bool,
    /// Longest job in bytes.
    pub(crate) unit: u64,
    /// What becomes of zeroes.
    pub(crate) zeroes: Zeroes,
    /// Whether to go on where it cannot be found out how the disk is stored.
    pub(crate) salvage: bool,
    /// Whether to copy data unseen, until there is some of which that cannot be done.
    pub(crate) offload: bool,
}

/// What becomes of zeroes that the source need not store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeroes {
    /// The target reads as zeroes where nothing is written.
    Skip,
    /// They are written as zeroes.
    Zero,
    /// They are written as data.
    Data,
}

impl<'a> Plan<'a> {
    /// A plan that takes the data in `unused`, which must be in order, for zeroes.
    pub(crate) fn new(disk: &'a Disk, unused: &'a [Range<u64>], rules: Rules) -> Self {
        let (stretches, size) = (disk.stretches(), disk.size());
        Self { stretches, current: None, problem: None, at: 0, size, rules, unused, left_out: 0 }
    }

    /// Bytes of data that were taken for zeroes so far.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out
    }

    fn step(&mut self) -> Result<Option<Job>, Error> {
        while self.at < self.size {
            let start = self.at;
            let stretch = self.stretch()?;
            let end = if stretch.range.end == self.size { self.size } else { self.floor(stretch.range.end) };
            let write = match (stretch.class, self.rules.zeroes) {
                (Class::Backing, _) | (Class::Zero, Zeroes::Skip) => false,
                (Class::Zero, Zeroes::Zero) => true,
                _ => return self.fill().map(Some),
            };
            if end <= start {
                return self.fill().map(Some);
            }
            self.advance(&stretch, end);
            if write {
                return Ok(Some(Job::Zero(start..end)));
            }
        }
        Ok(None)
    }

    fn floor(&self, offset: u64) -> u64 {
        offset - offset % self.rules.grain
    }

    fn fill(&mut self) -> Result<Job, Error> {
        let end = self.size.min(self.at + self.rules.unit);
        let mut chunks: Vec<Chunk> = Vec::new();
        while self.at < end {
            let at = self.at;
            let stretch = self.stretch()?;
            let request_end = at + REQUEST - (at - stretch.range.start) % REQUEST;
            let stop = stretch.range.end.min(request_end);
            // A request that would be cut begins the next job, if it is looked at.
            if stop > end && !chunks.is_empty() && self.rules.cuts_anywhere && !self.rules.offload {
                break;
            }
            let range = at..stop.min(end);
            self.advance(&stretch, range.end);
            let ends = range.end == stop;
            if stretch.class == Class::Data && !stretch.is_plain() {
                // As in QEMU, for good.
                self.rules.offload = false;
            }
            let unseen = self.rules.offload && stretch.class == Class::Data;
            chunks.push(Chunk { stretch: stretch.cut(range), ends, problem: self.problem.take(), unseen });
        }
        Ok(Job::Fill(chunks))
    }

    /// Goes on to `end`, which lies in `stretch` or at its end.
    fn advance(&mut self, stretch: &Stretch, end: u64) {
        if stretch.class == Class::Zero && self.current.as_ref().is_some_and(|stored| stored.class == Class::Data) {
            self.left_out += end - self.at;
        }
        self.at = end;
    }

    /// The stretch that holds `at`, or the part of it that is wholly needed or wholly not.
    fn stretch(&mut self) -> Result<Stretch, Error> {
        loop {
            if let Some(stretch) = &self.current
                && stretch.range.contains(&self.at)
            {
                return Ok(stretch.part(self.at, self.unused));
            }
            match self.stretches.next() {
                Some(Ok(stretch)) => self.current = Some(stretch),
                Some(Err(error)) if !self.rules.salvage => return Err(error),
                Some(Err(error)) => (self.current, self.problem) = (self.stretches.pass_over(), Some(error)),
                None => {
                    let start = self.at;
                    let problem = format!("the disk ends before byte {start}");
                    return Err(Error::Invalid { path: "disk".into(), problem });
                }
            }
        }
    }
}

impl Iterator for Plan<'_> {
    type Item = Result<Job, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, Some(Err(_))) {
            self.at = self.size;
        }
        step
    }
}
