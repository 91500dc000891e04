use std::ops::Range;
use std::thread::available_parallelism;

use qtk_block::{BlockRead, ExtentKind, Progress, read_padded};

use crate::chain::in_memory;
use crate::pipeline::{Next, ordered};
use crate::status::{Status, StatusFlags, Statuses};
use crate::{Error, Image};

/// Bytes compared at a time.
const UNIT: u64 = 2 << 20;

/// How two devices compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// The same content; where one is longer, it goes on with zeroes.
    Identical,
    /// The first byte that differs, or that is not zero past the end of the shorter one.
    Different {
        /// Where it is.
        offset: u64,
    },
    /// Asked strictly: not of the same size.
    SizesDiffer,
    /// Asked strictly: the first run that one stores and the other does not.
    AllocationDiffers {
        /// Where it begins.
        offset: u64,
    },
}

/// Compares what two images hold, as `qemu-img compare` does: a longer one is the same if its rest is zero, unless asked
/// `strict`ly, when sizes and the way that they store things must be the same too. Holes are not read. Progress is in bytes of
/// the longer one.
pub fn compare(first: &Image, second: &Image, strict: bool, progress: &dyn Progress) -> Result<Comparison, Error> {
    if strict && first.size() != second.size() {
        return Ok(Comparison::SizesDiffer);
    }
    let size = first.size().max(second.size());
    let mut result = Comparison::Identical;
    let mut done = 0;
    let threads = available_parallelism().map_or(1, usize::from);
    let buffers = || Ok((vec![0; in_memory(UNIT)], vec![0; in_memory(UNIT)]));
    ordered(
        first.path(),
        threads,
        Plan { sides: [Side::new(first), Side::new(second)], at: 0, size, strict },
        buffers,
        |(left, right), step| match step {
            Step::Read(range) => {
                let len = in_memory(range.end - range.start);
                let (left, right) = (&mut left[..len], &mut right[..len]);
                read(first, left, range.start)?;
                read(second, right, range.start)?;
                Ok((range.clone(), difference(left, right, range.start)))
            }
            Step::End { at, comparison } => Ok((at..at, Some(comparison))),
        },
        |(range, difference)| {
            // Of a part that differs only its start was reached.
            let reached = if difference.is_some() { range.start } else { range.end };
            progress.advance(reached - done);
            done = reached;
            match difference {
                Some(difference) => {
                    result = difference;
                    Ok(Next::Stop)
                }
                None => Ok(Next::Continue),
            }
        },
    )?;
    if result == Comparison::Identical {
        progress.advance(size - done);
    }
    Ok(result)
}

fn read(image: &Image, buf: &mut [u8], offset: u64) -> Result<(), Error> {
    read_padded(image, buf, offset).map_err(|source| Error::Compare { path: image.path().to_owned(), offset, source })
}

fn difference(left: &[u8], right: &[u8], start: u64) -> Option<Comparison> {
    if left == right {
        return None;
    }
    let same = left.iter().zip(right.iter()).take_while(|(a, b)| a == b).count();
    Some(Comparison::Different { offset: start + same as u64 })
}

enum Step {
    Read(Range<u64>),
    End { at: u64, comparison: Comparison },
}

/// One of the two images, and how it stores the current place.
struct Side<'a> {
    image: &'a Image,
    statuses: Statuses<'a>,
    current: Option<Status>,
}

impl<'a> Side<'a> {
    fn new(image: &'a Image) -> Self {
        Self { image, statuses: Statuses::new(image.chain(), 0..image.size()), current: None }
    }

    /// The run that holds `at`; none past the end.
    fn status_at(&mut self, at: u64) -> Result<Option<&Status>, Error> {
        while self.current.as_ref().is_none_or(|status| status.run.range.end <= at) {
            match self.statuses.next() {
                None => return Ok(None),
                Some(Ok(status)) => self.current = Some(status),
                Some(Err(source)) => {
                    let path = self.image.path().to_owned();
                    return Err(Error::Status { path, offset: at, source: Box::new(source) });
                }
            }
        }
        Ok(self.current.as_ref())
    }
}

/// The parts of two images that must be read.
struct Plan<'a> {
    sides: [Side<'a>; 2],
    at: u64,
    size: u64,
    strict: bool,
}

impl Plan<'_> {
    fn step(&mut self) -> Result<Option<Step>, Error> {
        while self.at < self.size {
            let (mut end, mut has_data, mut flags) = (self.size, false, [None; 2]);
            for (side, flags) in self.sides.iter_mut().zip(&mut flags) {
                let (chain, size) = (side.image.chain(), side.image.size());
                if let Some(status) = side.status_at(self.at)? {
                    end = end.min(status.run.range.end);
                    has_data |= status.run.kind.extent_kind() == ExtentKind::Data && !status.is_hole;
                    *flags = Some(StatusFlags::new(chain, status, size));
                }
            }
            if self.strict && flags[0] != flags[1] {
                let offset = std::mem::replace(&mut self.at, self.size);
                return Ok(Some(Step::End { at: offset, comparison: Comparison::AllocationDiffers { offset } }));
            }
            let start = self.at;
            if has_data {
                self.at = end.min(start + UNIT);
                return Ok(Some(Step::Read(start..self.at)));
            }
            self.at = end;
        }
        Ok(None)
    }
}

impl Iterator for Plan<'_> {
    type Item = Result<Step, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, Some(Err(_))) {
            self.at = self.size;
        }
        step
    }
}
