//! Transactions on raw images, with an overlay as redo log.
//!
//! The log is a qcow2 overlay on the image, so it shows the new state to everybody who can read qcow2. A finished log ends
//! in a trailer, which no cluster refers to: eight bytes of the SHA-256 of each sector that is about to be replaced, in the
//! order of the disk, and a [`Footer`]. Sectors, because a copy cut short by a power failure is torn between sectors: each
//! one is old or new, or somebody else's.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use qtk_block::{Access, BlockRead, BlockWrite, Extent, ExtentKind, HostStorage, RawFile, read_padded};
use qtk_qcow2::{Backing, CreateOptions, Layer};
use sha2::{Digest, Sha256};
use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chain::in_memory;
use crate::layer::SECTOR;
use crate::{ChainLayer, Error};

const MAGIC: [u8; 8] = *b"QTKREDO1";
const SECTOR_LEN: usize = 512;
/// Bytes copied or compared at a time: whole sectors.
const STEP: u64 = 1 << 20;

type SectorDigest = [u8; 8];

/// The last bytes of a log that is complete.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Footer {
    magic: [u8; 8],
    /// Where the sector digests begin in the log.
    digests_offset: U64,
    /// How many bytes of them there are.
    digests_len: U64,
    /// SHA-256 of the sector digests.
    digests_digest: [u8; 32],
    /// First bytes of the SHA-256 of the fields before.
    checksum: SectorDigest,
}

const FOOTER_LEN: u64 = size_of::<Footer>() as u64;

impl Footer {
    fn checksum(&self) -> SectorDigest {
        digest(&self.as_bytes()[..size_of::<Self>() - size_of::<SectorDigest>()])
    }
}

fn digest(bytes: &[u8]) -> SectorDigest {
    let mut short = SectorDigest::default();
    let full = Sha256::digest(bytes);
    short.copy_from_slice(&full[..size_of::<SectorDigest>()]);
    short
}

/// The log of the image at `path`. It has the image's own name: who opens the image next may come by another link.
fn log_path(path: &Path) -> PathBuf {
    let mut name = resolved(path).into_os_string();
    name.push(".qtk-txn");
    name.into()
}

fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// A raw image and what is to become of it.
#[derive(Debug)]
pub(crate) struct RedoLog {
    overlay: qtk_qcow2::Transaction,
    log: Arc<RawFile>,
    target: Target,
    /// The log once it is complete: then only copying it can be tried again.
    recorded: Mutex<Option<Box<Layer>>>,
}

/// A raw image and its log, by name and open.
#[derive(Debug)]
struct Target {
    image: Arc<RawFile>,
    image_path: PathBuf,
    log_path: PathBuf,
}

impl RedoLog {
    /// Begins a transaction on the whole file of `raw`, whose write lock is held.
    pub(crate) fn begin(raw: &ChainLayer) -> Result<Self, Error> {
        let path = raw.path();
        let metadata = raw.file().file().metadata().map_err(Error::io(path, "look at it"))?;
        if !metadata.is_file() {
            let problem = "a raw block device cannot be edited in a transaction; edit a copy in a file".to_owned();
            return Err(Error::Invalid { path: path.to_owned(), problem });
        }
        let target = Target::new(raw.file(), path);
        let log = target.create_log(metadata.permissions())?;
        match target.begin_overlay(&log) {
            Ok(overlay) => Ok(Self { overlay, log, target, recorded: Mutex::default() }),
            Err(error) => {
                target.remove_log()?;
                Err(error)
            }
        }
    }

    pub(crate) fn overlay(&self) -> &qtk_qcow2::Transaction {
        &self.overlay
    }

    pub(crate) fn commit(&self) -> Result<(), Error> {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = match recorded.take() {
            Some(layer) => layer,
            None => {
                let old_size = self.target.image.size();
                self.record().map(Box::new).inspect_err(|_| {
                    // It may look complete, though the disk has not said that it is stored.
                    let _ = self.target.remove_log();
                    if self.target.image.size() > old_size {
                        let _ = self.target.image.set_size(old_size);
                    }
                })?
            }
        };
        let layer = recorded.insert(layer);
        self.target.apply(layer).map_err(|source| self.target.unfinished(source))?;
        self.target.remove_log()
    }

    /// Completes the log. Before this returns, the transaction has not happened; after it, it has.
    fn record(&self) -> Result<Layer, Error> {
        self.overlay.commit()?;
        let layer = Layer::open(self.log.clone(), self.target.log_path.to_string_lossy())?;
        self.target.grow(layer.size())?;
        let begin = self.log.size().next_multiple_of(layer.cluster_size());
        let mut end = begin;
        let mut all = Sha256::new();
        let write_error = || Error::io(&self.target.log_path, "write to it");
        for extent in replaced(&layer) {
            let Extent { range, kind } = extent.map_err(Error::io(&self.target.log_path, "read it"))?;
            if kind == ExtentKind::Data {
                // So that a full disk is noticed while the image can still stay as it is.
                let reserve = self.target.image.reserve(range.clone());
                reserve.map_err(Error::io(&self.target.image_path, "reserve space in it"))?;
            }
            let mut old = vec![0; in_memory(range.end - range.start)];
            self.target.read_image(&mut old, range.start)?;
            let digests: Vec<u8> = old.chunks(SECTOR_LEN).flat_map(digest).collect();
            all.update(&digests);
            self.log.write_at(&digests, end).map_err(write_error())?;
            end += digests.len() as u64;
        }
        let mut footer = Footer {
            magic: MAGIC,
            digests_offset: begin.into(),
            digests_len: (end - begin).into(),
            digests_digest: all.finalize().into(),
            checksum: SectorDigest::default(),
        };
        footer.checksum = footer.checksum();
        self.log.write_at(footer.as_bytes(), end).map_err(write_error())?;
        self.log.flush().map_err(write_error())?;
        self.target.sync_folder()?;
        Ok(layer)
    }
}

impl Drop for RedoLog {
    fn drop(&mut self) {
        // A log that is complete waits to be finished; any other, and one just finished, is of no use.
        if !matches!(Log::read(self.log.clone(), &self.target.log_path), Ok(Some(_))) {
            let _ = std::fs::remove_file(&self.target.log_path);
        }
    }
}

/// The parts of the disk that a log replaces, in steps that fit in memory, and whether each holds data or zeroes.
fn replaced(layer: &Layer) -> impl Iterator<Item = io::Result<Extent>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < layer.size() {
            match layer.extent(at..layer.size().min(at + STEP)) {
                Ok(extent) => {
                    at = extent.range.end;
                    if extent.kind != ExtentKind::Unallocated {
                        return Some(Ok(extent));
                    }
                }
                Err(error) => {
                    at = layer.size();
                    return Some(Err(error));
                }
            }
        }
        None
    })
}

impl Target {
    fn new(image: &Arc<RawFile>, path: &Path) -> Self {
        Self { image: image.clone(), image_path: resolved(path), log_path: log_path(path) }
    }

    /// Makes an empty log, which holds what the image holds and so is for nobody else to read.
    fn create_log(&self, permissions: Permissions) -> Result<Arc<RawFile>, Error> {
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&self.log_path);
        let log = file.and_then(|file| file.set_permissions(permissions).and_then(|()| RawFile::from_file(file)));
        Ok(Arc::new(log.map_err(Error::io(&self.log_path, "create the transaction's log"))?))
    }

    fn begin_overlay(&self, log: &Arc<RawFile>) -> Result<qtk_qcow2::Transaction, Error> {
        let size = self.image.size().next_multiple_of(SECTOR);
        let image_name = self.image_path.file_name().unwrap_or_default().to_string_lossy();
        // Not to be taken for a protocol.
        let name = if image_name.contains(':') { format!("./{image_name}") } else { image_name.into_owned() };
        let backing = Some(Backing { name, format: Some("raw".to_owned()) });
        // Subclusters, so that nothing but what was written is copied.
        let options = CreateOptions { size, backing, extended_l2: true, ..CreateOptions::default() };
        let name = self.log_path.to_string_lossy();
        qtk_qcow2::create(log.clone(), &name, &options)?;
        let layer = Arc::new(Layer::open(log.clone(), name)?);
        Ok(qtk_qcow2::Transaction::begin(layer, Some(self.image.clone()))?)
    }

    /// Lets the image have at least `size` bytes. Sectors do not count that it ends in.
    fn grow(&self, size: u64) -> Result<(), Error> {
        if self.image.size().next_multiple_of(SECTOR) >= size {
            return Ok(());
        }
        self.image.set_size(size).map_err(Error::io(&self.image_path, "set its size"))
    }

    fn read_image(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        let read = read_padded(&*self.image, buf, offset);
        read.map_err(|source| Error::Read { path: self.image_path.clone(), offset, source })
    }

    /// Copies what the log holds into the image. Can be done again after it was cut short.
    fn apply(&self, layer: &Layer) -> Result<(), Error> {
        let mut new = Vec::new();
        for extent in replaced(layer) {
            let Extent { range, kind } = extent.map_err(Error::io(&self.log_path, "read it"))?;
            let write = if kind == ExtentKind::Zero {
                self.image.zero(range)
            } else {
                new.resize(in_memory(range.end - range.start), 0);
                layer.read_at(&mut new, range.start).map_err(Error::io(&self.log_path, "read it"))?;
                self.image.write_at(&new, range.start)
            };
            write.map_err(Error::io(&self.image_path, "write to it"))?;
        }
        self.image.flush().map_err(Error::io(&self.image_path, "sync it"))
    }

    fn unfinished(&self, source: Error) -> Error {
        Error::Unfinished { path: self.image_path.clone(), log: self.log_path.clone(), source: Box::new(source) }
    }

    fn remove_log(&self) -> Result<(), Error> {
        std::fs::remove_file(&self.log_path).map_err(Error::io(&self.log_path, "remove it"))?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<(), Error> {
        let folder = match self.log_path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder, "sync it"))
    }
}

/// A log that is complete.
struct Log {
    layer: Layer,
    footer: Footer,
    file: Arc<RawFile>,
}

impl Log {
    /// The log in `file`, or `None` if it was never completed.
    fn read(file: Arc<RawFile>, path: &Path) -> Result<Option<Self>, Error> {
        let read_error = || Error::io(path, "read it");
        let Some(footer_offset) = file.size().checked_sub(FOOTER_LEN) else { return Ok(None) };
        let mut footer = Footer::new_zeroed();
        file.read_at(footer.as_mut_bytes(), footer_offset).map_err(read_error())?;
        let digests = footer.digests_offset.get()..footer_offset;
        let complete = footer.magic == MAGIC
            && footer.checksum == footer.checksum()
            && digests.end.checked_sub(digests.start) == Some(footer.digests_len.get());
        if !complete {
            return Ok(None);
        }
        let mut all = Sha256::new();
        let mut at = digests.start;
        while at < digests.end {
            let mut bytes = vec![0; in_memory(STEP.min(digests.end - at))];
            file.read_at(&mut bytes, at).map_err(read_error())?;
            all.update(&bytes);
            at += bytes.len() as u64;
        }
        if footer.digests_digest[..] != all.finalize()[..] {
            return Ok(None);
        }
        let layer = Layer::open(file.clone(), path.to_string_lossy())?;
        Ok(Some(Self { layer, footer, file }))
    }

    /// Fails unless every sector that the log replaces is what it was, or what it is to become.
    fn verify(&self, target: &Target) -> Result<(), Error> {
        let foreign =
            |offset| Error::ForeignChange { path: target.image_path.clone(), log: target.log_path.clone(), offset };
        let log_error = || Error::io(&target.log_path, "read it");
        if target.image.size().next_multiple_of(SECTOR) != self.layer.size() {
            return Err(foreign(target.image.size().min(self.layer.size())));
        }
        let mut digests_at = self.footer.digests_offset.get();
        for extent in replaced(&self.layer) {
            let range = extent.map_err(log_error())?.range;
            let len = in_memory(range.end - range.start);
            let (mut current, mut new) = (vec![0; len], vec![0; len]);
            let mut digests = vec![0; len / SECTOR_LEN * size_of::<SectorDigest>()];
            target.read_image(&mut current, range.start)?;
            self.layer.read_at(&mut new, range.start).map_err(log_error())?;
            self.file.read_at(&mut digests, digests_at).map_err(log_error())?;
            digests_at += digests.len() as u64;
            let sectors = current.chunks(SECTOR_LEN).zip(new.chunks(SECTOR_LEN));
            for ((index, (current, new)), old) in (0..).zip(sectors).zip(digests.as_chunks().0) {
                if current != new && digest(current) != *old {
                    return Err(foreign(range.start + index * SECTOR));
                }
            }
        }
        Ok(())
    }
}

/// What an unfinished transaction left of the raw image in `image`, which is open and, for writing, locked.
pub(crate) enum Leftover {
    /// Nothing, or nothing any more.
    None,
    /// A complete log, through which the image must be read.
    ReadThrough(Box<ChainLayer>),
}

/// Finishes or drops an unfinished transaction where the image is open for writing, and else finds out whether there is one.
pub(crate) fn recover(image_path: &Path, image: &Arc<RawFile>, access: Access) -> Result<Leftover, Error> {
    let target = Target::new(image, image_path);
    let Some(file) = open_log(&target.log_path)? else { return Ok(Leftover::None) };
    match (Log::read(file, &target.log_path)?, access) {
        (None, Access::ReadOnly) => Ok(Leftover::None),
        (None, Access::ReadWrite) => {
            target.remove_log()?;
            Ok(Leftover::None)
        }
        (Some(log), Access::ReadOnly) => {
            log.verify(&target)?;
            // As it is open: its name goes when its writer is done.
            Ok(Leftover::ReadThrough(Box::new(ChainLayer::of_log(&target.log_path, log.file, log.layer)?)))
        }
        (Some(log), Access::ReadWrite) => {
            log.verify(&target)?;
            target.apply(&log.layer).map_err(|source| target.unfinished(source))?;
            target.remove_log()?;
            Ok(Leftover::None)
        }
    }
}

/// Makes sure that no log waits for the file that is about to appear at `path`, where it would be taken for that one's.
pub(crate) fn clear_place(path: &Path) -> Result<(), Error> {
    let log_path = log_path(path);
    let Some(file) = open_log(&log_path)? else { return Ok(()) };
    if Log::read(file, &log_path)?.is_none() {
        return std::fs::remove_file(&log_path).map_err(Error::io(&log_path, "remove it"));
    }
    let log = log_path.display();
    let problem = format!("{log} holds a change to the image that was here; remove {log} to give that up");
    Err(Error::Invalid { path: path.to_owned(), problem })
}

fn open_log(path: &Path) -> Result<Option<Arc<RawFile>>, Error> {
    match RawFile::open(path, Access::ReadOnly) {
        Ok(log) => Ok(Some(Arc::new(log))),
        // An image's name may leave no room for the log's.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename) => Ok(None),
        Err(error) => Err(Error::io(path, "open the log of an unfinished transaction")(error)),
    }
}

#[cfg(test)]
mod tests;
