use std::ops::Range;
use std::path::Path;
use std::thread::available_parallelism;

use qtk_block::{BlockRead, ExtentKind, Progress, read_padded};

use crate::Error;
use crate::chain::in_memory;
use crate::pipeline::{Next, ordered};

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

/// Compares what two devices hold, as `qemu-img compare` does: a longer one is the same if its rest is zero, unless asked
/// `strict`ly, when sizes and holes must be the same too. Holes are not read. Progress is in bytes of the longer one.
pub fn compare(
    first: &dyn BlockRead,
    second: &dyn BlockRead,
    strict: bool,
    progress: &dyn Progress,
) -> Result<Comparison, Error> {
    if strict && first.size() != second.size() {
        return Ok(Comparison::SizesDiffer);
    }
    let size = first.size().max(second.size());
    let pair = Pair { first, second, size };
    let mut result = Comparison::Identical;
    let mut done = 0;
    let threads = available_parallelism().map_or(1, usize::from);
    let buffers = || Ok((vec![0; in_memory(UNIT)], vec![0; in_memory(UNIT)]));
    ordered(
        Path::new("comparison"),
        threads,
        Plan { pair: &pair, at: 0, strict, known: [(false, 0); 2] },
        buffers,
        |(first, second), step| match step {
            Step::Read(range) => {
                let difference = pair.difference(range.clone(), first, second)?;
                Ok((range.end, difference.map(|offset| Comparison::Different { offset })))
            }
            Step::End(comparison) => Ok((size, Some(comparison))),
        },
        |(end, difference)| {
            progress.advance(end - done);
            done = end;
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

struct Pair<'a> {
    first: &'a dyn BlockRead,
    second: &'a dyn BlockRead,
    size: u64,
}

impl Pair<'_> {
    fn difference(&self, range: Range<u64>, first: &mut [u8], second: &mut [u8]) -> Result<Option<u64>, Error> {
        let len = in_memory(range.end - range.start);
        let (first, second) = (&mut first[..len], &mut second[..len]);
        read_padded(self.first, first, range.start).map_err(read_error(range.start))?;
        read_padded(self.second, second, range.start).map_err(read_error(range.start))?;
        if first == second {
            return Ok(None);
        }
        let same = first.iter().zip(second.iter()).take_while(|(a, b)| a == b).count();
        Ok(Some(range.start + same as u64))
    }
}

fn read_error(offset: u64) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Compare { offset, source }
}

enum Step {
    Read(Range<u64>),
    End(Comparison),
}

/// The parts of two devices that must be read.
struct Plan<'a> {
    pair: &'a Pair<'a>,
    at: u64,
    strict: bool,
    /// For each device whether there is data at the current place, and where that changes.
    known: [(bool, u64); 2],
}

impl Plan<'_> {
    fn extent(&mut self, index: usize) -> Result<(bool, u64), Error> {
        let device = [self.pair.first, self.pair.second][index];
        if self.known[index].1 <= self.at {
            self.known[index] = if self.at < device.size() {
                let extent = device.extent(self.at..device.size()).map_err(read_error(self.at))?;
                (extent.kind == ExtentKind::Data, extent.range.end)
            } else {
                (false, self.pair.size)
            };
        }
        Ok(self.known[index])
    }

    fn step(&mut self) -> Result<Option<Step>, Error> {
        while self.at < self.pair.size {
            let (first_data, first_end) = self.extent(0)?;
            let (second_data, second_end) = self.extent(1)?;
            let end = first_end.min(second_end);
            if self.strict && first_data != second_data {
                let offset = std::mem::replace(&mut self.at, self.pair.size);
                return Ok(Some(Step::End(Comparison::AllocationDiffers { offset })));
            }
            if first_data || second_data {
                let start = self.at;
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
        self.step().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qtk_block::{BlockWrite, MemoryDisk, NoProgress};

    fn disk(size: u64, writes: &[(u64, &[u8])]) -> MemoryDisk {
        let disk = MemoryDisk::new(size);
        for (offset, bytes) in writes {
            disk.write_at(bytes, *offset).unwrap();
        }
        disk
    }

    #[test]
    fn finds_the_first_difference_and_forgives_zero_tails() {
        let size = 9 << 20;
        let one = disk(size, &[(5_000_000, b"abc")]);
        for (other, expected) in [
            (disk(size, &[(5_000_000, b"abc")]), Comparison::Identical),
            (disk(size, &[(100, &[0; 9]), (5_000_000, b"abc")]), Comparison::Identical),
            (disk(size + 4096, &[(5_000_000, b"abc")]), Comparison::Identical),
            (disk(size, &[(5_000_000, b"abd"), (7_000_000, b"x")]), Comparison::Different { offset: 5_000_002 }),
            (disk(size, &[]), Comparison::Different { offset: 5_000_000 }),
            (disk(size + 999, &[(5_000_000, b"abc"), (size + 7, b"x")]), Comparison::Different { offset: size + 7 }),
        ] {
            assert_eq!(compare(&one, &other, false, &NoProgress).unwrap(), expected);
            assert_eq!(compare(&other, &one, false, &NoProgress).unwrap(), expected);
        }
    }

    #[test]
    fn strictness_asks_for_sizes_and_holes() {
        let one = disk(8192, &[(0, b"a")]);
        let longer = disk(8193, &[(0, b"a")]);
        let written = disk(8192, &[(0, b"a"), (5000, &[0])]);
        assert_eq!(compare(&one, &longer, true, &NoProgress).unwrap(), Comparison::SizesDiffer);
        let allocation = Comparison::AllocationDiffers { offset: 4096 };
        assert_eq!(compare(&one, &written, true, &NoProgress).unwrap(), allocation);
        assert_eq!(compare(&one, &one, true, &NoProgress).unwrap(), Comparison::Identical);
    }
}
