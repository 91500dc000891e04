use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, Window};
use qtk_ext4::{EditOptions, Ext4};

use super::{Follow, Node, Tree, Volume, root};
use crate::fat::Fat;
use crate::fstab::{self, Source};
use crate::layout::{Layout, Slot};
use crate::{Content, Error, GuestPath, PathProblem, Place};

/// Something odd about a guest's disk that leaves the rest usable.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Warning {
    /// The primary GPT is damaged, and the backup at the disk's end was used.
    BackupGpt,
    /// The fstab names a file system that is not on this disk.
    Missing {
        /// Where it belongs.
        mount_point: GuestPath,
        /// How the fstab calls it.
        source: Source,
    },
    /// A file system of the fstab is on this disk, but cannot be opened or mounted.
    Unavailable {
        /// Where it belongs.
        mount_point: GuestPath,
        /// Why it is not there.
        error: Arc<Error>,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackupGpt => write!(f, "the primary GPT is damaged; the backup was used (`sgdisk -e` repairs it)"),
            Self::Missing { mount_point, source } => {
                write!(f, "{mount_point}: /etc/fstab mounts {source} here, which is not on this disk")
            }
            Self::Unavailable { mount_point, error } => {
                write!(f, "{mount_point}: {error}")?;
                let mut source = std::error::Error::source(error);
                while let Some(error) = source {
                    write!(f, ": {error}")?;
                    source = error.source();
                }
                Ok(())
            }
        }
    }
}

/// The disk beneath a tree.
pub(super) enum Device {
    ReadOnly(Arc<dyn BlockRead>),
    Writable(Arc<dyn BlockWrite>),
}

impl Device {
    fn whole(&self) -> Arc<dyn BlockRead> {
        match self {
            Self::ReadOnly(device) => Arc::clone(device),
            Self::Writable(device) => Arc::<dyn BlockWrite>::clone(device),
        }
    }

    pub(super) fn reader(&self, slot: &Slot) -> Result<Arc<dyn BlockRead>, Error> {
        let window = Window::new(self.whole(), slot.range.clone());
        window.map(|window| Arc::new(window) as _).map_err(|source| Error::Io {
            action: "read",
            place: slot.place,
            source,
        })
    }

    fn writer(&self, slot: &Slot) -> Result<Option<Arc<dyn BlockWrite>>, Error> {
        let Self::Writable(device) = self else { return Ok(None) };
        let window = Window::new(Arc::clone(device), slot.range.clone());
        let window = window.map_err(|source| Error::Io { action: "write", place: slot.place, source })?;
        Ok(Some(Arc::new(window)))
    }

    fn open(&self, slot: &Slot) -> Result<Volume, Error> {
        let place = slot.place;
        let reader = self.reader(slot)?;
        match slot.probe.content {
            content if content.is_ext() => {
                let fs = Ext4::open(reader).map_err(|source| Error::ext4(place, source))?;
                Ok(Volume::Ext4(Box::new(fs), self.writer(slot)?))
            }
            Content::Fat => Fat::open(reader).map(Volume::Fat).map_err(|source| Error::Fat { place, source }),
            content => Err(Error::Foreign { place, content }),
        }
    }
}

pub(super) struct Mount {
    pub(super) path: GuestPath,
    pub(super) place: Place,
    pub(super) volume: Volume,
}

impl Mount {
    pub(super) fn root(&self, index: usize) -> Node {
        Node { mount: index, file: self.volume.root() }
    }
}

/// File systems that need no device of ours.
const NOT_ON_A_DISK: [&[u8]; 12] = [
    b"swap",
    b"tmpfs",
    b"proc",
    b"sysfs",
    b"devpts",
    b"devtmpfs",
    b"nfs",
    b"nfs4",
    b"cifs",
    b"9p",
    b"virtiofs",
    b"overlay",
];

impl Tree {
    pub(super) fn assemble(device: Device, root: Option<u32>, options: Option<EditOptions>) -> Result<Self, Error> {
        let layout = Layout::read(&device.whole())?;
        let slot = root::choose(&device, &layout, root)?;
        let mount = Mount { path: GuestPath::from("/"), place: slot.place, volume: device.open(slot)? };
        let mut tree = Self {
            mounts: vec![mount],
            covered: BTreeMap::new(),
            blocked: BTreeMap::new(),
            warnings: Vec::new(),
            options,
        };
        if layout.table.as_ref().is_some_and(|table| table.from_backup) {
            tree.warnings.push(Warning::BackupGpt);
        }
        tree.mount_all(&device, &layout)?;
        Ok(tree)
    }

    fn mount_all(&mut self, device: &Device, layout: &Layout) -> Result<(), Error> {
        let text = match self.read_small("/etc/fstab") {
            Ok(text) => text,
            // Without a usable fstab, the root is all there is.
            Err(Error::Path { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut entries: Vec<_> = fstab::parse(&text).into_iter().filter(is_wanted).collect();
        // A mount point must be there before what is mounted below it.
        entries
            .sort_by_key(|entry| entry.mount_point.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).count());
        for entry in entries {
            let mount_point = GuestPath(entry.mount_point.clone());
            match layout.find(&entry.source) {
                Some(slot) => {
                    if let Err(error) = self.mount_one(device, slot, &mount_point) {
                        let error = Arc::new(error);
                        if let Ok(node) = self.resolve(mount_point.as_bytes(), Follow::All) {
                            self.blocked.insert(node, (mount_point.clone(), Arc::clone(&error)));
                        }
                        self.warnings.push(Warning::Unavailable { mount_point, error });
                    }
                }
                None if entry.has_option("nofail") => {}
                None => self.warnings.push(Warning::Missing { mount_point, source: entry.source }),
            }
        }
        Ok(())
    }

    fn mount_one(&mut self, device: &Device, slot: &Slot, mount_point: &GuestPath) -> Result<(), Error> {
        let node = self.resolve(mount_point.as_bytes(), Follow::All)?;
        if !self.metadata(node)?.is_dir() {
            return Err(Error::path(mount_point.as_bytes(), PathProblem::NotADirectory));
        }
        self.check_available(node)?;
        // Two editors on one file system would destroy it.
        if self.mounts.iter().any(|mount| mount.place == slot.place) {
            return Err(Error::Unsupported {
                place: slot.place,
                feature: "it is mounted elsewhere in the tree already",
            });
        }
        let mount = Mount { path: mount_point.clone(), place: slot.place, volume: device.open(slot)? };
        let root = mount.root(self.mounts.len());
        self.mounts.push(mount);
        self.covered.insert(node, root);
        Ok(())
    }
}

/// Whether an entry stands for a file system that belongs into the tree at all times.
fn is_wanted(entry: &fstab::Entry) -> bool {
    let on_demand = entry.has_option("noauto") && !entry.has_option("x-systemd.automount");
    let is_below_root = entry.mount_point.starts_with(b"/") && entry.mount_point.iter().any(|&byte| byte != b'/');
    let on_a_disk = match &entry.source {
        Source::Other(device) => device.starts_with(b"/dev/"),
        Source::Root => false,
        _ => true,
    };
    is_below_root && on_a_disk && !on_demand && !NOT_ON_A_DISK.contains(&entry.kind.as_slice())
}
