//! What of a disk nobody needs: the free blocks of ext2, ext3 and ext4, and swap spaces.

mod rival;
mod swap;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::{BlockRead, Window};
use qtk_ext4::{Ext4, FileType, Ino};

use crate::{Content, Error, Layout, Place, Probe};
use swap::Swap;

/// The most ranges that are kept of a disk. Where free space lies in more pieces, the small ones count as used.
const MAX_RANGES: usize = 1 << 20;
/// A file that a machine sleeps in is larger than this.
const MIN_SLEEP_FILE: u64 = 1 << 20;
/// The most files that are looked at for it.
const MAX_FILES: usize = 1024;
/// And down to which level: the root directory is the first.
const DEPTH: usize = 3;

/// What of a disk nobody needs.
#[derive(Debug, Default)]
pub struct Unused {
    /// Byte ranges of the disk, in order and apart from each other.
    pub ranges: Vec<Range<u64>>,
    /// What was looked at: every partition, or the disk as a whole.
    pub volumes: Vec<UnusedOfVolume>,
}

/// What of a partition nobody needs.
#[derive(Debug)]
pub struct UnusedOfVolume {
    /// Where it is.
    pub place: Place,
    /// What it holds.
    pub content: Content,
    /// Bytes of it that nobody needs, or why it is taken to be needed as a whole.
    pub unused: Result<u64, Needed>,
}

/// Why something is taken to be needed as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Needed {
    /// Only ext file systems and swap spaces are known so well.
    #[error("what is free in it is not known")]
    Foreign,
    /// The memory of a sleeping machine is on the disk, and with it a newer state of its file systems.
    #[error("the machine was put to sleep on disk and may need all of it when it wakes; shut it down")]
    Asleep,
    /// There are traces of something else too.
    #[error("there are traces of {0} in the same place")]
    Rival(&'static str),
    /// A swap space whose header makes no sense.
    #[error("{0}")]
    Swap(&'static str),
    /// The partition table or the device beneath.
    #[error(transparent)]
    Disk(#[from] Error),
    /// The bitmaps of the file system may not tell what is free.
    #[error(transparent)]
    Ext4(#[from] qtk_ext4::Error),
}

impl Unused {
    /// Looks at all partitions of a disk, or at the disk if it has none. Whatever is in doubt is taken to be needed.
    ///
    /// The answer holds while nobody writes to the disk, and for machines that start from it anew: one that goes on with what
    /// it had in its memory, after a sleep or from a snapshot, may use blocks that no file system on disk knows of yet.
    #[must_use]
    pub fn find(device: &Arc<dyn BlockRead>) -> Self {
        let whole = |content, needed| Self {
            ranges: Vec::new(),
            volumes: vec![UnusedOfVolume { place: Place::Disk, content, unused: Err(needed) }],
        };
        let layout = match Layout::read(device) {
            Ok(layout) => layout,
            Err(error) => return whole(Content::Unknown, error.into()),
        };
        if layout.table.is_some() {
            match Probe::read(device).map_err(read_error(Place::Disk)) {
                // A table that is older than the file system around it leads to the middle of that.
                Ok(Probe { content, .. }) if !is_table(content) => {
                    return whole(content, Needed::Rival("a partition table"));
                }
                Ok(_) => {}
                Err(error) => return whole(Content::Unknown, error.into()),
            }
        }
        Self::in_slots(device, &layout)
    }

    fn in_slots(device: &Arc<dyn BlockRead>, layout: &Layout) -> Self {
        let limit = MAX_RANGES.checked_div(layout.slots.len()).unwrap_or(MAX_RANGES);
        let mut unused = Self::default();
        for slot in &layout.slots {
            let (place, content) = (slot.place, slot.probe.content);
            let found = Window::new(Arc::clone(device), slot.range.clone())
                .map_err(|source| read_error(place)(source).into())
                .and_then(|window| in_volume(&(Arc::new(window) as Arc<dyn BlockRead>), place, content, limit));
            let bytes = found.map(|ranges| {
                let bytes =
                    ranges.iter().map(|range| range.end.saturating_sub(range.start)).fold(0, u64::saturating_add);
                let start = slot.range.start;
                let on_disk = |range: Range<u64>| range.start.saturating_add(start)..range.end.saturating_add(start);
                unused.ranges.extend(ranges.into_iter().map(on_disk));
                bytes
            });
            unused.volumes.push(UnusedOfVolume { place, content, unused: bytes });
        }
        if unused.volumes.iter().any(|volume| matches!(volume.unused, Err(Needed::Asleep))) {
            unused.ranges.clear();
            let answers = unused.volumes.iter_mut().filter(|volume| volume.unused.is_ok());
            answers.for_each(|volume| volume.unused = Err(Needed::Asleep));
        }
        // Partitions are numbered in any order.
        unused.ranges.sort_by_key(|range| range.start);
        unused
    }
}

fn is_table(content: Content) -> bool {
    matches!(content, Content::Gpt | Content::Mbr | Content::Empty | Content::Unknown)
}

fn read_error(place: Place) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { action: "read", place, source }
}

/// The ranges of one volume, counted from its start.
fn in_volume(
    device: &Arc<dyn BlockRead>,
    place: Place,
    content: Content,
    limit: usize,
) -> Result<Vec<Range<u64>>, Needed> {
    let io = read_error(place);
    let swap = swap::read(&**device).map_err(&io)?;
    if swap == Swap::Asleep {
        return Err(Needed::Asleep);
    }
    if !content.is_ext() && content != Content::Swap {
        return Err(Needed::Foreign);
    }
    if let Some(rival) = rival::find(&**device).map_err(&io)? {
        return Err(Needed::Rival(rival));
    }
    match swap {
        Swap::None => in_ext4(device, limit),
        _ if content.is_ext() => Err(Needed::Rival("a swap space")),
        Swap::Unused(range) => Ok(vec![range]),
        Swap::Damaged(problem) => Err(Needed::Swap(problem)),
        Swap::Asleep => Err(Needed::Asleep),
    }
}

fn in_ext4(device: &Arc<dyn BlockRead>, limit: usize) -> Result<Vec<Range<u64>>, Needed> {
    let fs = Ext4::open(Arc::clone(device))?;
    if fs.needs_recovery() && holds_sleeper(&fs)? {
        return Err(Needed::Asleep);
    }
    let mut ranges = Ranges::new(limit);
    fs.for_each_free(|range| ranges.push(range))?;
    Ok(ranges.finish())
}

/// Whether a file where swap files usually lie (`/swapfile`, `/swap/swapfile`, `/var/swap/file`) holds a sleeping machine's
/// memory.
fn holds_sleeper(fs: &Ext4) -> Result<bool, qtk_ext4::Error> {
    let (mut seen, mut looked_at) = (HashSet::from([Ino::ROOT]), 0_usize);
    let mut folders = vec![Ino::ROOT];
    for _ in 0..DEPTH {
        let mut beneath = Vec::new();
        for entry in folders.into_iter().map(|folder| fs.read_dir(folder)).collect::<Result<Vec<_>, _>>()?.concat() {
            if !seen.insert(entry.ino) {
                continue;
            }
            let metadata = fs.metadata(entry.ino)?;
            match metadata.file_type {
                FileType::Directory => beneath.push(entry.ino),
                FileType::Regular if metadata.size >= MIN_SLEEP_FILE && looked_at < MAX_FILES => {
                    looked_at = looked_at.saturating_add(1);
                    let mut head = vec![0; swap::HEAD];
                    fs.read_at(entry.ino, &mut head, 0)?;
                    if swap::is_asleep(&head) {
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
        folders = beneath;
    }
    Ok(false)
}

/// Ranges in order, joined where they touch; of too many the small ones are dropped.
struct Ranges {
    kept: Vec<Range<u64>>,
    limit: usize,
    min_len: u64,
}

impl Ranges {
    fn new(limit: usize) -> Self {
        Self { kept: Vec::new(), limit, min_len: 1 }
    }

    fn push(&mut self, range: Range<u64>) {
        match self.kept.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => {
                if self.kept.len() >= self.limit {
                    self.make_room();
                }
                self.kept.push(range);
            }
        }
    }

    /// Makes so much that it need not be done again soon.
    fn make_room(&mut self) {
        let enough = self.limit.saturating_sub(self.limit / 4);
        self.drop_small();
        while self.kept.len() >= enough.max(1) {
            self.min_len = self.min_len.saturating_mul(2);
            self.drop_small();
        }
    }

    fn drop_small(&mut self) {
        let min_len = self.min_len;
        self.kept.retain(|range| range.end.saturating_sub(range.start) >= min_len);
    }

    fn finish(mut self) -> Vec<Range<u64>> {
        self.drop_small();
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::Ranges;

    #[test]
    fn of_too_many_ranges_the_large_ones_stay() {
        let mut ranges = Ranges::new(10);
        for at in 0..1000_u64 {
            let len = if at % 200 == 7 { 64 } else { 1 + at % 3 };
            ranges.push(at * 100..at * 100 + len);
        }
        ranges.push(100_000..100_064);
        ranges.push(100_064..100_065);
        let starts: Vec<u64> = ranges.finish().iter().map(|range| range.start).collect();
        assert_eq!(starts, [700, 20_700, 40_700, 60_700, 80_700, 100_000]);
    }
}
