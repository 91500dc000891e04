use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, Durability, ExtentKind, OutputFile, Progress};
use qtk_qcow2::{CreateOptions, Layer};

use crate::convert::{hold_still, refuse_used};
use crate::{Error, Image};

/// Most that is read at once.
const UNIT: u64 = 1 << 20;
/// What is lost together where reading fails: the host's blocks, which no cluster is smaller than by much.
const GRAIN: u64 = 4096;

/// What [`salvage`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Salvage {
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Bytes of it that could not be read.
    pub lost: u64,
}

/// Copies what can be read of a disk to a new qcow2 file `output`, which appears when it is whole.
///
/// `lost` gets the ranges of the disk that cannot be read, in order and each as long as it can be; the copy is zero there.
/// Progress is in bytes of the disk.
pub fn salvage(
    image: &Image,
    output: &Path,
    lost: &mut dyn FnMut(Range<u64>),
    progress: &dyn Progress,
) -> Result<Salvage, Error> {
    let _held = hold_still(std::slice::from_ref(image))?;
    let _lock = refuse_used(output)?;
    let file = OutputFile::create(output, Durability::OnDisk).map_err(Error::io(output, "create it"))?;
    let storage = file.storage().clone();
    let name = output.to_string_lossy();
    qtk_qcow2::create(storage.clone(), &name, &CreateOptions { size: image.size(), ..CreateOptions::default() })?;
    let copy = qtk_qcow2::Transaction::begin(Arc::new(Layer::open(storage, name)?), None)?;
    let mut losses = Losses { total: 0, open: 0..0, lost };
    copy_readable(image, &copy, &mut losses, progress).map_err(Error::io(output, "write it"))?;
    losses.close();
    copy.commit()?;
    file.commit().map_err(Error::io(output, "put it in place"))?;
    Ok(Salvage { disk_size: image.size(), lost: losses.total })
}

/// Joins lost ranges that touch.
struct Losses<'a> {
    total: u64,
    open: Range<u64>,
    lost: &'a mut dyn FnMut(Range<u64>),
}

impl Losses<'_> {
    fn add(&mut self, range: Range<u64>) {
        self.total += range.end - range.start;
        if range.start == self.open.end {
            self.open.end = range.end;
        } else {
            self.close();
            self.open = range;
        }
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            (self.lost)(std::mem::take(&mut self.open));
        }
    }
}

/// Errors are those of the target.
fn copy_readable(
    disk: &dyn BlockRead,
    target: &dyn BlockWrite,
    losses: &mut Losses<'_>,
    progress: &dyn Progress,
) -> std::io::Result<()> {
    let mut at = 0;
    while at < disk.size() {
        let end = match disk.extent(at..disk.size()) {
            Ok(extent) if extent.kind != ExtentKind::Data => extent.range.end,
            Ok(extent) => {
                let range = at..extent.range.end.min((at + 1).next_multiple_of(UNIT));
                copy_range(disk, target, range.clone(), losses)?;
                range.end
            }
            Err(_) => {
                let range = at..disk.size().min((at + 1).next_multiple_of(GRAIN));
                losses.add(range.clone());
                range.end
            }
        };
        progress.advance(end - at);
        at = end;
    }
    Ok(())
}

/// Copies a range of data, or what can be read of it.
fn copy_range(
    disk: &dyn BlockRead,
    target: &dyn BlockWrite,
    range: Range<u64>,
    losses: &mut Losses<'_>,
) -> std::io::Result<()> {
    let mut buf = vec![0; usize::try_from(range.end - range.start).map_err(std::io::Error::other)?];
    if disk.read_at(&mut buf, range.start).is_ok() {
        return target.write_at(&buf, range.start);
    }
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at + 1).next_multiple_of(GRAIN));
        buf.resize(usize::try_from(end - at).map_err(std::io::Error::other)?, 0);
        match disk.read_at(&mut buf, at) {
            Ok(()) => target.write_at(&buf, at)?,
            Err(_) => losses.add(at..end),
        }
        at = end;
    }
    Ok(())
}
