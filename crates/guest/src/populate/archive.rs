//! Tar archives, and the layers of container images that they can be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_ext4::Timestamp;

use super::header::{self, BLOCK, BLOCK_LEN, Block, Damage, Header, Records};
use super::manifest::{Attributes, Content, Id, Kind, Manifest, Node};
use super::{PopulateError, Result, host, sparse};
use crate::xattr::is_portable;

/// How an archive is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArchiveOptions {
    /// Owner and group of everything, in place of those recorded.
    pub owner: Option<(u32, u32)>,
    /// Whether it is a layer of a container image, in which `.wh.NAME` removes a name of the layers beneath and
    /// `.wh..wh..opq` all names of its directory.
    pub layer: bool,
}

/// Headers of names and attributes may be as long as this.
const MAX_EXTRA: u64 = 1 << 20;
/// The longest target of a link.
const MAX_TARGET: usize = 4095;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const XATTR: &[u8] = b"SCHILY.xattr.";
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// An archive, open for reading at any place.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) path: PathBuf,
    pub(super) file: File,
    len: u64,
}

impl Archive {
    /// Opens an archive. What is compressed or no regular file is unpacked into a nameless temporary file first.
    fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(host("read", path))?;
        let mut start = [0; 4];
        let is_file = file.metadata().map_err(host("read", path))?.is_file();
        let known = if is_file { file.read_at(&mut start, 0).map_err(host("read", path))? } else { 0 };
        if start[..known].starts_with(&GZIP) {
            let problem = "it is compressed with gzip, which is not read here: unpack it with gunzip, or use zstd";
            return Err(PopulateError::Archive { path: path.to_owned(), offset: 0, problem: problem.to_owned() });
        }
        if start[..known] == ZSTD || !is_file {
            let mut unpacked = tempfile::tempfile().map_err(host("make room to unpack", path))?;
            if start[..known] == ZSTD {
                unpack_zstd(&file, &unpacked).map_err(host("unpack", path))?;
            } else {
                std::io::copy(&mut file, &mut unpacked).map_err(host("read", path))?;
            }
            unpacked.seek(SeekFrom::Start(0)).map_err(host("unpack", path))?;
            file = unpacked;
        }
        let len = file.metadata().map_err(host("read", path))?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    fn damage(&self, offset: u64, problem: impl Into<String>) -> PopulateError {
        PopulateError::Archive { path: self.path.clone(), offset, problem: problem.into() }
    }

    fn block(&self, offset: u64) -> Result<Block> {
        let mut block = [0; BLOCK_LEN];
        self.read(&mut block, offset)?;
        Ok(block)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(self.damage(offset, "the archive ends too early"));
        }
        self.file.read_exact_at(buf, offset).map_err(host("read", &self.path))
    }
}

#[cfg(feature = "pure-rust")]
fn unpack_zstd(packed: &File, mut unpacked: &File) -> std::io::Result<()> {
    std::io::copy(&mut structured_zstd::decoding::StreamingDecoder::new(packed), &mut unpacked).map(drop)
}

#[cfg(not(feature = "pure-rust"))]
fn unpack_zstd(packed: &File, unpacked: &File) -> std::io::Result<()> {
    zstd::stream::copy_decode(packed, unpacked)
}

impl Manifest {
    /// Adds everything in a tar archive (ustar, pax or GNU; as it is or compressed with zstd). Owners are taken by number. A
    /// name that comes again replaces the earlier one, and no name leads out of the root.
    pub fn add_archive(&mut self, path: &Path, options: &ArchiveOptions) -> Result<()> {
        let archive = Arc::new(Archive::open(path)?);
        let mut reader = Reader {
            manifest: self,
            archive: &archive,
            options,
            at: 0,
            globals: Records::default(),
            added: BTreeMap::new(),
        };
        while let Some(entry) = reader.next()? {
            let offset = entry.offset;
            reader.add(entry).map_err(|error| match error {
                PopulateError::Name { name, problem } => {
                    archive.damage(offset, format!("{}: {problem}", String::from_utf8_lossy(&name)))
                }
                error => error,
            })?;
        }
        Ok(())
    }
}

/// A header with all that comes before it, and where its content lies.
struct Entry {
    header: Header,
    records: Records,
    /// Of the header.
    offset: u64,
    content: u64,
    /// The map of a file with holes, in the old GNU format.
    old_map: Option<sparse::Map>,
}

struct Reader<'a> {
    manifest: &'a mut Manifest,
    archive: &'a Arc<Archive>,
    options: &'a ArchiveOptions,
    at: u64,
    globals: Records,
    /// Names that this archive added to directories: a whiteout removes only what other layers had.
    added: BTreeMap<Id, BTreeSet<Vec<u8>>>,
}

impl Reader<'_> {
    /// The next entry that is one, with the long names and records before it.
    fn next(&mut self) -> Result<Option<Entry>> {
        let mut records = self.globals.clone();
        let (mut long_path, mut long_link) = (None, None);
        while self.at < self.archive.len {
            let offset = self.at;
            let block = self.archive.block(offset)?;
            if block.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            let damage = |problem: Damage| self.archive.damage(offset, problem);
            let mut header = Header::parse(&block).map_err(damage)?;
            let content = offset + BLOCK;
            match header.kind {
                b'x' | b'g' => {
                    let text = self.extra(&header, content)?;
                    let into = if header.kind == b'g' { &mut self.globals } else { &mut records };
                    into.read(&text).map_err(damage)?;
                    if header.kind == b'g' {
                        records = self.globals.clone();
                    }
                }
                b'L' => long_path = Some(header::text(&self.extra(&header, content)?).to_vec()),
                b'K' => long_link = Some(header::text(&self.extra(&header, content)?).to_vec()),
                _ => {
                    if let Some(size) = records.number("size").map_err(damage)? {
                        header.size = size;
                    }
                    header.path = long_path.take().unwrap_or(header.path);
                    header.link = long_link.take().unwrap_or(header.link);
                    let (old_map, content) = self.old_map(&header, &block, content)?;
                    self.skip(&header, content)?;
                    return Ok(Some(Entry { header, records, offset, content, old_map }));
                }
            }
            self.skip(&header, content)?;
        }
        Ok(None)
    }

    fn skip(&mut self, header: &Header, content: u64) -> Result<()> {
        let end = header.stored().and_then(|stored| content.checked_add(stored));
        // The padding of the last file may be missing.
        let end = end.filter(|end| end - BLOCK < self.archive.len).or_else(|| end.filter(|&end| end == content));
        self.at = end.ok_or_else(|| self.archive.damage(content, "the archive ends too early"))?;
        Ok(())
    }

    /// The content of a header that belongs to the next one.
    fn extra(&self, header: &Header, content: u64) -> Result<Vec<u8>> {
        if header.size > MAX_EXTRA {
            return Err(self.archive.damage(content, "a name or the attributes of a file are longer than 1 MiB"));
        }
        let mut text = vec![0; usize::try_from(header.size).unwrap_or(0)];
        self.archive.read(&mut text, content)?;
        Ok(text)
    }

    /// The map of a sparse file in the old GNU format, which may go on in blocks of its own, and where the content begins.
    fn old_map(&self, header: &Header, block: &Block, content: u64) -> Result<(Option<sparse::Map>, u64)> {
        if header.kind != b'S' {
            return Ok((None, content));
        }
        let damage = |problem: Damage| self.archive.damage(content, problem);
        let (mut map, mut more) = sparse::old_entries(block, true).map_err(damage)?;
        let mut content = content;
        while more {
            let (entries, again) = sparse::old_entries(&self.archive.block(content)?, false).map_err(damage)?;
            map.extend(entries);
            more = again;
            content += BLOCK;
        }
        Ok((Some(map), content))
    }

    fn add(&mut self, entry: Entry) -> Result<()> {
        let Entry { header, records, offset, .. } = &entry;
        let path = records.get("GNU.sparse.name").or(records.get("path")).unwrap_or(&header.path).to_vec();
        let Some((parent, name)) = self.manifest.parent_of(&path)? else {
            if header.kind == b'5' {
                let attributes = self.attributes(&entry)?;
                self.manifest.set_attributes(Manifest::ROOT, attributes);
            }
            return Ok(());
        };
        if self.options.layer && name.starts_with(WHITEOUT) {
            self.white_out(parent, name);
            return Ok(());
        }
        self.added.entry(parent).or_default().insert(name.to_vec());
        let link = records.get("linkpath").unwrap_or(&header.link);
        if header.kind == b'1' {
            let existing = self.manifest.find(link)?;
            let existing = existing.filter(|&id| self.manifest.children(id).is_none()).ok_or_else(|| {
                let target = String::from_utf8_lossy(link);
                self.archive.damage(*offset, format!("a hard link to {target}, which is no file of the archive"))
            })?;
            self.manifest.link(parent, name, existing);
            return Ok(());
        }
        let kind = match header.kind {
            b'0' | b'7' | 0 if path.ends_with(b"/") => Kind::Directory(BTreeMap::new()),
            b'0' | b'7' | 0 | b'S' => self.file(&entry)?,
            b'2' if link.is_empty() || link.len() > MAX_TARGET => {
                return Err(self.archive.damage(*offset, "a symbolic link's target is empty or too long"));
            }
            b'2' => Kind::Symlink(link.to_vec()),
            b'3' => Kind::CharDevice(header.device.0, header.device.1),
            b'4' => Kind::BlockDevice(header.device.0, header.device.1),
            b'5' | b'D' => Kind::Directory(BTreeMap::new()),
            b'6' => Kind::Fifo,
            // A volume's label, and what continues on another volume.
            b'V' => return Ok(()),
            kind => {
                let problem = format!("an entry of the unknown type {:?}", char::from(kind));
                return Err(self.archive.damage(*offset, problem));
            }
        };
        let node = Node { attributes: self.attributes(&entry)?, kind };
        self.manifest.put(parent, name, node);
        Ok(())
    }

    /// Removes what layers beneath have under a name, or in a whole directory. What this layer has itself stays.
    fn white_out(&mut self, parent: Id, name: &[u8]) {
        if name == OPAQUE {
            self.keep_own(parent);
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT)
            && !self.added.get(&parent).is_some_and(|own| own.contains(hidden))
        {
            self.manifest.remove(parent, hidden);
        }
    }

    /// Removes from a directory, and from those in it, what this layer did not bring.
    fn keep_own(&mut self, directory: Id) {
        let mut left = vec![directory];
        while let Some(directory) = left.pop() {
            let own = self.added.get(&directory);
            self.manifest.retain(directory, |name| own.is_some_and(|own| own.contains(name)));
            left.extend(self.manifest.children(directory).into_iter().flat_map(BTreeMap::values));
        }
    }

    fn file(&self, entry: &Entry) -> Result<Kind> {
        let Entry { header, records, offset, content, old_map } = entry;
        let damage = |problem: Damage| self.archive.damage(*offset, problem);
        let mut content = *content;
        let mut stored = header.size;
        let real =
            records.number("GNU.sparse.realsize").or_else(|_| records.number("GNU.sparse.size")).map_err(damage)?;
        let real = real.or(records.number("GNU.sparse.size").map_err(damage)?);
        let map = if let Some(map) = old_map {
            Some((map.clone(), header.real_size))
        } else if records.get("GNU.sparse.major") == Some(b"1") {
            let end = content.saturating_add(stored);
            let mut at = content;
            let read = || {
                if at >= end {
                    return Ok(Vec::new());
                }
                let block = self.archive.block(at).map_err(|_| "the archive ends too early")?;
                at += BLOCK;
                Ok(block.to_vec())
            };
            let (map, taken) = sparse::read_map(read).map_err(damage)?;
            content += taken;
            stored = stored.checked_sub(taken).ok_or_else(|| damage("the map of a sparse file is malformed"))?;
            Some((map, real.unwrap_or(0)))
        } else {
            sparse::of_records(records).map_err(damage)?.map(|map| (map, real.unwrap_or(0)))
        };
        if content.checked_add(stored).is_none_or(|end| end > self.archive.len) {
            return Err(damage("the archive ends too early"));
        }
        let (size, pieces, sparse) = match map {
            Some((map, size)) => (size, sparse::lay_out(&map, content, stored, size).map_err(damage)?, true),
            None if stored == 0 => (0, Vec::new(), false),
            None => (stored, vec![(0..stored, content)], false),
        };
        Ok(Kind::File { size, content: Content::Pieces(self.archive.clone(), pieces), sparse })
    }

    fn attributes(&self, entry: &Entry) -> Result<Attributes> {
        let Entry { header, records, offset, .. } = entry;
        let damage = |problem: Damage| self.archive.damage(*offset, problem);
        let id = |key, recorded| {
            let value = records.number(key).map_err(damage)?.map_or(Ok(recorded), u32::try_from);
            value.map_err(|_| damage("an owner's number is out of range"))
        };
        let (uid, gid) = match self.options.owner {
            Some(owner) => owner,
            None => (id("uid", header.uid)?, id("gid", header.gid)?),
        };
        let (seconds, nanos) = match records.get("mtime") {
            Some(text) => header::time(text).ok_or_else(|| damage("a time in a pax header is malformed"))?,
            None => (header.mtime, 0),
        };
        let named = |(key, value): (&Vec<u8>, &Vec<u8>)| Some((key.strip_prefix(XATTR)?.to_vec(), value.clone()));
        let xattrs = records.by_key.iter().filter_map(named).filter(|(name, _)| is_portable(name)).collect();
        Ok(Attributes { permissions: header.permissions, uid, gid, mtime: Some(Timestamp { seconds, nanos }), xattrs })
    }
}
