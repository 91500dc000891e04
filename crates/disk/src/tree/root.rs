//! Which partition is the guest's root.

use std::sync::Arc;

use qtk_block::BlockRead;
use qtk_ext4::{Ext4, FileType, Ino};

use super::mount::Device;
use crate::layout::{Layout, Slot};
use crate::{Content, Error, Place};

/// Chooses the slot that is the guest's root: the one asked for, the only file system, or the one that looks like it.
pub(super) fn choose<'a>(device: &Device, layout: &'a Layout, asked: Option<u32>) -> Result<&'a Slot, Error> {
    if let Some(number) = asked {
        return by_number(layout, number);
    }
    let file_systems: Vec<&Slot> = layout.slots.iter().filter(|slot| slot.probe.content.is_ext()).collect();
    if let [only] = file_systems[..] {
        return Ok(only);
    }
    let mut damage = None;
    let mut opened = Vec::new();
    for slot in &file_systems {
        match device.reader(slot).and_then(|reader| looks(reader, slot.place)) {
            Ok(looks) => opened.push((*slot, looks)),
            Err(error) => damage = damage.or(Some(error)),
        }
    }
    for wanted in [Looks::Configured, Looks::Bootable] {
        let candidates: Vec<&Slot> =
            opened.iter().filter(|(_, looks)| *looks == wanted).map(|&(slot, _)| slot).collect();
        match candidates[..] {
            [] => {}
            [only] => return Ok(only),
            _ => return Err(Error::SeveralRoots { candidates: Layout::contents(candidates) }),
        }
    }
    Err(damage.unwrap_or_else(|| Error::NoRoot { found: Layout::contents(&layout.slots) }))
}

fn by_number(layout: &Layout, number: u32) -> Result<&Slot, Error> {
    let slot = layout.partition(number)?;
    match slot.probe.content {
        content if content.is_ext() || content == Content::Fat => Ok(slot),
        content => Err(Error::Foreign { place: slot.place, content }),
    }
}

/// How much a file system looks like a root.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Looks {
    /// It has `/etc/fstab` or `/etc/os-release`.
    Configured,
    /// It has `/usr` or `/sbin/init`.
    Bootable,
    Otherwise,
}

fn looks(device: Arc<dyn BlockRead>, place: Place) -> Result<Looks, Error> {
    let found = Ext4::open(device).and_then(|fs| {
        if has(&fs, b"etc", b"fstab")? || has(&fs, b"etc", b"os-release")? {
            return Ok(Looks::Configured);
        }
        let bootable = has(&fs, b"sbin", b"init")? || fs.lookup(Ino::ROOT, b"usr")?.is_some();
        Ok(if bootable { Looks::Bootable } else { Looks::Otherwise })
    });
    found.map_err(|source| Error::ext4(place, source))
}

fn has(fs: &Ext4, dir: &[u8], name: &[u8]) -> Result<bool, qtk_ext4::Error> {
    match fs.lookup(Ino::ROOT, dir)? {
        Some(dir) if fs.metadata(dir)?.file_type == FileType::Directory => Ok(fs.lookup(dir, name)?.is_some()),
        _ => Ok(false),
    }
}
