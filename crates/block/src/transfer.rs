//! Bytes that go from one file of the host to another without passing through memory, where the host can do that.

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::io::Errno;

use crate::{BlockRead, BlockWrite, HostStorage, RawFile, sys};

/// Whether two files can hold bytes in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// They do now.
    Done,
    /// Not these bytes: they do not begin and end at blocks of the file system, or the source ends before. Nothing was changed.
    Unaligned,
    /// Not these files: the file system cannot do it, or they lie on two. Nothing was changed.
    Impossible,
}

impl RawFile {
    /// Lets `range` have its place on the disk in common with as many bytes of `source` from `from` on, until one of them is
    /// changed. The file grows to the range's end.
    pub fn share(&self, source: &RawFile, from: u64, range: Range<u64>) -> io::Result<Sharing> {
        let block = self.file().metadata()?.blksize().max(1);
        let whole = [from, range.start, range.end - range.start].iter().all(|at| at.is_multiple_of(block));
        if !whole || range.is_empty() {
            return Ok(Sharing::Unaligned);
        }
        if source.size() < from.saturating_add(range.end - range.start) {
            return Ok(Sharing::Unaligned);
        }
        match sys::clone_range(source.file(), self.file(), from, range.clone()) {
            Ok(()) => {
                self.reaches(range.end);
                Ok(Sharing::Done)
            }
            Err(error) if Errno::from_io_error(&error).is_some_and(is_refusal) => Ok(Sharing::Impossible),
            Err(error) => Err(error),
        }
    }

    /// Copies as many bytes of `source` from `from` on to `range`: by sharing them, else in the kernel, else through memory.
    /// Past the source's end lie zeroes.
    pub fn copy_from(&self, source: &RawFile, from: u64, range: Range<u64>) -> io::Result<()> {
        if self.share(source, from, range.clone())? == Sharing::Done {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let (mut source_at, mut target_at) = (from + (at - range.start), at);
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let copied = rustix::fs::copy_file_range(
                source.file(),
                Some(&mut source_at),
                self.file(),
                Some(&mut target_at),
                len,
            );
            match copied {
                // The source's end, or a file whose length the kernel does not know.
                Ok(0) => break,
                Ok(len) => {
                    at += len as u64;
                    self.reaches(at);
                    self.count_written(len as u64);
                }
                Err(Errno::INTR) => {}
                Err(error) if is_refusal(error) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.copy_through_memory(source, from + (at - range.start), at..range.end)
    }

    fn copy_through_memory(&self, source: &RawFile, from: u64, range: Range<u64>) -> io::Result<()> {
        const STEP: u64 = 1 << 20;
        let len = |at: u64| usize::try_from((range.end - at).min(STEP)).unwrap_or_default();
        let mut buf = vec![0; len(range.start)];
        let mut at = range.start;
        while at < range.end {
            let part = &mut buf[..len(at)];
            match source.file().read_at(part, from + (at - range.start)) {
                Ok(0) => {
                    self.zero(at..range.end)?;
                    return if range.end > self.size() { self.set_size(range.end) } else { Ok(()) };
                }
                Ok(read) => {
                    self.write_at(&part[..read], at)?;
                    at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether an error says that two files cannot be copied so, and not that it failed.
fn is_refusal(error: Errno) -> bool {
    let refusals =
        [Errno::XDEV, Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOTTY, Errno::PERM, Errno::TXTBSY];
    refusals.contains(&error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_in(folder: &str) -> RawFile {
        RawFile::from_file(tempfile::tempfile_in(folder).unwrap()).unwrap()
    }

    fn content(file: &RawFile) -> Vec<u8> {
        let mut content = vec![1; usize::try_from(file.size()).unwrap()];
        file.read_at(&mut content, 0).unwrap();
        assert_eq!(file.file().metadata().unwrap().len(), file.size());
        content
    }

    /// Bytes of which no two sectors are the same.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 512 + at).to_le_bytes()[0] | 1).collect()
    }

    #[test]
    fn copies_within_and_across_file_systems() {
        let here = std::env::temp_dir();
        for target_folder in [here.to_str().unwrap(), "/dev/shm"] {
            let source = file_in(here.to_str().unwrap());
            let bytes = pattern((3 << 20) + 700);
            source.write_at(&bytes, 0).unwrap();
            for (from, to, len) in [(0, 0, bytes.len()), (4096, 1 << 16, 2 << 20), (513, 77, 99_999), (5, 3, 0)] {
                let target = file_in(target_folder);
                target.copy_from(&source, from, to..to + len as u64).unwrap();
                let start = usize::try_from(from).unwrap();
                let copied = content(&target);
                let (before, after) = copied.split_at(copied.len().min(usize::try_from(to).unwrap()));
                assert!(before.iter().all(|&byte| byte == 0));
                assert!(after == &bytes[start..start + len]);
            }
        }
    }

    #[test]
    fn what_lies_past_the_source_is_zero() {
        for folder in [std::env::temp_dir().to_str().unwrap(), "/dev/shm"] {
            let (source, target) = (file_in(folder), file_in(folder));
            let bytes = pattern(5000);
            source.write_at(&bytes, 0).unwrap();
            target.write_at(&[7; 20_000], 0).unwrap();
            target.copy_from(&source, 1000, 2000..12_000).unwrap();
            let copied = content(&target);
            assert!(copied[2000..6000] == bytes[1000..]);
            assert!(copied[6000..12_000].iter().all(|&byte| byte == 0));
            assert!(copied[..2000].iter().chain(&copied[12_000..]).all(|&byte| byte == 7));
        }
    }

    #[test]
    fn shares_whole_blocks_or_changes_nothing() {
        let folder = std::env::temp_dir();
        let (source, target) = (file_in(folder.to_str().unwrap()), file_in(folder.to_str().unwrap()));
        let bytes = pattern(1 << 20);
        source.write_at(&bytes, 0).unwrap();
        assert_eq!(target.share(&source, 1, 0..4096).unwrap(), Sharing::Unaligned);
        assert_eq!(target.share(&source, 1 << 20, 0..4096).unwrap(), Sharing::Unaligned);
        match target.share(&source, 1 << 16, 0..1 << 19).unwrap() {
            Sharing::Done => assert!(content(&target) == bytes[1 << 16..][..1 << 19]),
            Sharing::Impossible => assert_eq!(target.size(), 0),
            Sharing::Unaligned => panic!("blocks larger than 64 KiB"),
        }
        let elsewhere = file_in("/dev/shm");
        assert_eq!(elsewhere.share(&source, 0, 0..1 << 20).unwrap(), Sharing::Impossible);
    }
}
