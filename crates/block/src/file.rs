use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::{BlockRead, BlockWrite, Extent, ExtentKind, HostStorage, checked_range, sys};

/// How a [`RawFile`] is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading only.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}

/// A regular file or block device on the host. Holes of sparse files show as [`ExtentKind::Zero`].
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: AtomicU64,
    is_device: bool,
    /// Bytes written, where the host is to begin early to bring them to disk.
    written: Option<AtomicU64>,
}

/// Bytes after which the host begins to bring them to disk.
const WRITEBACK_STEP: u64 = 16 << 20;

impl RawFile {
    /// Opens an existing file or block device. Anything else (a folder, a pipe) is `InvalidInput`.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        // An image may name a pipe as its backing file, and opening one waits for its other end.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        options.read(true).write(access == Access::ReadWrite).custom_flags(flags.bits().cast_signed());
        Self::from_file(options.open(path)?)
    }

    /// Takes over an open file or block device.
    pub fn from_file(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"));
        }
        let size = if is_device { rustix::fs::seek(&file, SeekFrom::End(0))? } else { metadata.len() };
        Ok(Self { file, size: AtomicU64::new(size), is_device, written: None })
    }

    /// The same, and the host begins to bring to disk what is written while more is being written, so that a flush at the end
    /// finds little left to do. A block device stays as it is.
    #[must_use]
    pub fn with_early_writeback(self) -> Self {
        Self { written: (!self.is_device).then(AtomicU64::default), ..self }
    }

    /// Takes note that the file has bytes up to `end`.
    pub(crate) fn reaches(&self, end: u64) {
        self.size.fetch_max(end, Ordering::AcqRel);
    }

    /// Takes note of bytes that were written.
    pub(crate) fn count_written(&self, len: u64) {
        let Some(written) = &self.written else { return };
        let before = written.fetch_add(len, Ordering::Relaxed);
        if before / WRITEBACK_STEP != (before + len) / WRITEBACK_STEP {
            sys::start_writeback(&self.file);
        }
    }

    /// Gives the open file back.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes the space that writes to `range` will need, where the file system can. What the range reads as stays the same.
    pub fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if !self.is_device && !range.is_empty() {
            self.fallocate(FallocateFlags::KEEP_SIZE, &range)?;
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, range: &Range<u64>) -> io::Result<bool> {
        match rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        const STEP: usize = 1 << 16;
        let zeroes = [0_u8; STEP];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(STEP).min(STEP);
            self.file.write_all_at(&zeroes[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }
}

impl BlockRead for RawFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        checked_range(offset, buf.len(), self.size())?;
        self.file.read_exact_at(buf, offset)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        // Nothing uses the file position, so moving it does no harm.
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(Extent { range, kind: ExtentKind::Zero }),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Extent { range, kind: ExtentKind::Data }),
            Err(error) => return Err(error.into()),
        };
        if data > range.start {
            return Ok(Extent { range: range.start..data.min(range.end), kind: ExtentKind::Zero });
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(range.start))?;
        // A file that shrinks meanwhile has its hole at `start`; an extent must not be empty.
        let end = if hole > range.start { hole.min(range.end) } else { range.end };
        Ok(Extent { range: range.start..end, kind: ExtentKind::Data })
    }
}

impl BlockWrite for RawFile {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let limit = if self.is_device { self.size() } else { u64::MAX };
        let range = checked_range(offset, buf.len(), limit)?;
        let result = self.file.write_all_at(buf, offset);
        // What was written before a failure, as on a full disk, is there all the same.
        let end = match &result {
            Ok(()) => range.end,
            Err(_) if self.is_device => 0,
            Err(_) => self.file.metadata().map_or(0, |metadata| metadata.len()),
        };
        self.reaches(end);
        self.count_written(buf.len() as u64);
        result
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let range = range.start..range.end.min(self.size());
        if range.is_empty() {
            return Ok(());
        }
        let punched = self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, &range)?;
        if punched || self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, &range)? {
            return Ok(());
        }
        self.write_zeroes(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let range = range.start..range.end.min(self.size());
        if !range.is_empty() {
            self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, &range)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl HostStorage for RawFile {
    fn set_size(&self, size: u64) -> io::Result<()> {
        if self.is_device {
            return if size <= self.size() {
                Ok(())
            } else {
                Err(io::Error::new(io::ErrorKind::StorageFull, "a block device cannot grow"))
            };
        }
        self.file.set_len(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.end > self.size() {
            self.set_size(range.end)?;
        }
        Self::reserve(self, range)
    }

    fn as_raw_file(&self) -> Option<&RawFile> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_holes_and_punches_them() {
        let raw = RawFile::from_file(tempfile::tempfile().unwrap()).unwrap();
        raw.set_size(3 << 20).unwrap();
        raw.write_at(&[7; 1 << 20], 1 << 20).unwrap();
        assert_eq!(raw.extent(0..3 << 20).unwrap(), Extent { range: 0..1 << 20, kind: ExtentKind::Zero });
        assert_eq!(raw.extent(1 << 20..3 << 20).unwrap(), Extent { range: 1 << 20..2 << 20, kind: ExtentKind::Data });
        assert_eq!(raw.extent(2 << 20..3 << 20).unwrap().kind, ExtentKind::Zero);
        raw.zero(1 << 20..2 << 20).unwrap();
        let mut buf = [1; 16];
        raw.read_at(&mut buf, 1 << 20).unwrap();
        assert_eq!(buf, [0; 16]);
        assert!(raw.read_at(&mut buf, (3 << 20) - 1).is_err());
    }

    #[test]
    fn reserves_space_without_changing_what_is_read() {
        use std::os::unix::fs::MetadataExt;
        let raw = RawFile::from_file(tempfile::tempfile().unwrap()).unwrap();
        raw.set_size(1 << 20).unwrap();
        raw.write_at(b"kept", 5000).unwrap();
        raw.reserve(0..1 << 20).unwrap();
        assert!(raw.file().metadata().unwrap().blocks() * 512 >= 1 << 20);
        let mut content = vec![1; 1 << 20];
        raw.read_at(&mut content, 0).unwrap();
        assert_eq!(content.iter().filter(|&&byte| byte != 0).count(), 4);
        assert_eq!(raw.file().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn refuses_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(RawFile::open(folder.path(), Access::ReadOnly).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn refuses_a_pipe_without_waiting_for_its_other_end() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            assert_eq!(RawFile::open(&pipe, access).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
