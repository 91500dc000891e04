//! Copying content to where it was placed, on threads of their own while names are made on another.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use qtk_block::{BlockRead, BlockWrite, ExtentKind, RawFile};
use qtk_ext4::PlacedRun;

use super::manifest::Content;
use super::{PopulateError, Result, host};

/// Bytes that go to the device at once.
const BATCH: u64 = 1 << 20;
/// Batches that wait for a thread.
const WAITING: usize = 8;

/// A file to copy.
pub(super) struct Job<'a> {
    pub(super) content: &'a Content,
    pub(super) size: u64,
    pub(super) runs: Vec<PlacedRun>,
}

type Batch<'a> = Vec<Job<'a>>;

/// Takes jobs, in batches.
pub(super) struct Queue<'a> {
    sender: SyncSender<Batch<'a>>,
    batch: Batch<'a>,
    bytes: u64,
}

impl<'a> Queue<'a> {
    /// False once nobody takes jobs any more, because one failed.
    pub(super) fn push(&mut self, job: Job<'a>) -> bool {
        self.bytes += job.runs.iter().map(|run| run.len).sum::<u64>();
        self.batch.push(job);
        self.bytes < BATCH || self.send()
    }

    fn send(&mut self) -> bool {
        self.bytes = 0;
        self.sender.send(std::mem::take(&mut self.batch)).is_ok()
    }
}

/// Runs `work`, which fills the queue, while other threads empty it.
pub(super) fn copy_beside<'a, T>(device: &dyn BlockWrite, work: impl FnOnce(&mut Queue<'a>) -> Result<T>) -> Result<T> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4);
    let (sender, receiver) = sync_channel(WAITING);
    let receiver = Mutex::new(Some(receiver));
    std::thread::scope(|scope| {
        let copiers: Vec<_> = (0..threads).map(|_| scope.spawn(|| copy_all(device, &receiver))).collect();
        let mut queue = Queue { sender, batch: Vec::new(), bytes: 0 };
        let result = work(&mut queue);
        let sent = queue.send();
        drop(queue);
        let mut copied = Ok(());
        for copier in copiers {
            let one = copier.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            copied = copied.and(one);
        }
        debug_assert!(sent || copied.is_err());
        copied.and(result)
    })
}

/// Copies batches until there are no more. After an error nobody takes any.
fn copy_all(device: &dyn BlockWrite, receiver: &Mutex<Option<Receiver<Batch<'_>>>>) -> Result<()> {
    let lock = || receiver.lock().unwrap_or_else(PoisonError::into_inner);
    let mut pending = Pending { device, start: 0, bytes: Vec::new() };
    loop {
        let Some(batch) = lock().as_ref().and_then(|receiver| receiver.recv().ok()) else { return Ok(()) };
        let copied = batch.iter().try_for_each(|job| copy(job, &mut pending)).and_then(|()| pending.flush());
        if copied.is_err() {
            drop(lock().take());
            return copied;
        }
    }
}

/// Bytes that wait for what comes right behind them on the device.
struct Pending<'a> {
    device: &'a dyn BlockWrite,
    start: u64,
    bytes: Vec<u8>,
}

impl Pending<'_> {
    /// Room for `len` zero bytes at `offset` of the device, to be filled.
    fn room(&mut self, offset: u64, len: usize) -> Result<&mut [u8]> {
        let end = self.start + self.bytes.len() as u64;
        if offset != end || self.bytes.len() as u64 >= BATCH {
            self.flush()?;
            self.start = offset;
        }
        let from = self.bytes.len();
        self.bytes.resize(from + len, 0);
        Ok(&mut self.bytes[from..])
    }

    fn flush(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            let write = |source| qtk_ext4::Error::Io { operation: "write", offset: self.start, source };
            let written = self.device.write_at(&self.bytes, self.start).map_err(write);
            self.bytes.clear();
            return written.map_err(|source| PopulateError::FileSystem { name: b"content".to_vec(), source });
        }
        Ok(())
    }
}

fn copy(job: &Job<'_>, pending: &mut Pending<'_>) -> Result<()> {
    let source = Source::open(job.content)?;
    for run in &job.runs {
        let end = run.file_offset + run.len;
        let mut at = run.file_offset;
        while at < end {
            let len = (end - at).min(BATCH);
            let buf = pending.room(run.device_offset + (at - run.file_offset), usize::try_from(len).unwrap_or(0))?;
            source.read(buf, at, job.size)?;
            at += len;
        }
    }
    Ok(())
}

/// Content, open.
enum Source<'a> {
    File(&'a std::path::Path, File),
    Pieces(&'a super::archive::Archive, &'a [(Range<u64>, u64)]),
}

impl<'a> Source<'a> {
    fn open(content: &'a Content) -> Result<Self> {
        Ok(match content {
            Content::File(path) => Self::File(path, File::open(path).map_err(host("read", path))?),
            Content::Pieces(archive, pieces) => Self::Pieces(archive, pieces),
        })
    }

    /// Fills `buf`, which holds zeroes, from byte `at` of the file, as far as the file reaches.
    fn read(&self, buf: &mut [u8], at: u64, size: u64) -> Result<()> {
        let wanted = at..size.min(at + buf.len() as u64);
        if wanted.is_empty() {
            return Ok(());
        }
        let part = |range: &Range<u64>| {
            let within = |offset: u64| usize::try_from(offset - at).unwrap_or(usize::MAX);
            within(range.start)..within(range.end)
        };
        match self {
            Self::File(path, file) => {
                let read = file.read_exact_at(&mut buf[part(&wanted)], at);
                read.map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => io::Error::other("it became shorter while it was read"),
                    _ => error,
                })
                .map_err(host("read", path))
            }
            Self::Pieces(archive, pieces) => {
                let first = pieces.partition_point(|(range, _)| range.end <= wanted.start);
                for (range, place) in pieces[first..].iter().take_while(|(range, _)| range.start < wanted.end) {
                    let here = range.start.max(wanted.start)..range.end.min(wanted.end);
                    let place = place + (here.start - range.start);
                    let read = archive.file.read_exact_at(&mut buf[part(&here)], place);
                    read.map_err(host("read", &archive.path))?;
                }
                Ok(())
            }
        }
    }
}

/// The ranges of a file that hold data.
pub(super) fn data_ranges(content: &Content, size: u64, sparse: bool) -> Result<Vec<Range<u64>>> {
    let path = match content {
        Content::Pieces(_, pieces) => return Ok(pieces.iter().map(|(range, _)| range.clone()).collect()),
        Content::File(_) if !sparse => return Ok(std::iter::once(0..size).collect()),
        Content::File(path) => path,
    };
    let file = File::open(path).and_then(RawFile::from_file).map_err(host("read", path))?;
    let mut ranges = Vec::new();
    let mut at = 0;
    let size = size.min(file.size());
    while at < size {
        let extent = file.extent(at..size).map_err(host("read", path))?;
        at = extent.range.end;
        if extent.kind == ExtentKind::Data {
            ranges.push(extent.range);
        }
    }
    Ok(ranges)
}
