//! Inodes that wait for the next mount to free or truncate them, and the orphan file's own blocks.

use super::Check;
use super::inodes::Orphans;
use crate::error::{Error, Result};
use crate::features::{compat, ro_compat};
use crate::map::FileMap;
use crate::orphan::OrphanBlock;
use crate::{FindingKind, Ino, Place};

/// Reads the list and the file. What is wrong with them is reported, what they name so far is kept.
pub(super) fn read(check: &Check<'_>) -> Result<Orphans> {
    let mut orphans = Orphans::new();
    list(check, &mut orphans)?;
    file(check, &mut orphans)?;
    if !orphans.is_empty() {
        let text = format!("{} inodes wait to be freed or truncated by the next mount", orphans.len());
        check.findings.note(FindingKind::Orphan, Place::Superblock, text);
    }
    Ok(orphans)
}

fn list(check: &Check<'_>, orphans: &mut Orphans) -> Result<()> {
    let mut next = check.fs.superblock.last_orphan();
    while let Some(ino) = next {
        let inode = match check.fs.inode(ino) {
            Ok(inode) => inode,
            Err(Error::Corrupt { .. } | Error::NoSuchInode(_)) => {
                damage(check, ino, "the list of orphans leads to an inode that cannot be one");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if ino.get() < check.fs.geometry().first_ino || inode.mode() == 0 {
            damage(check, ino, "the list of orphans leads to an inode that cannot be one");
            return Ok(());
        }
        if !orphans.insert(ino) {
            damage(check, ino, "the list of orphans goes round in circles");
            return Ok(());
        }
        next = Ino::new(inode.dtime());
    }
    Ok(())
}

fn damage(check: &Check<'_>, ino: Ino, text: &'static str) {
    check.findings.damage(FindingKind::Orphan, Place::Inode(ino), text);
}

fn file(check: &Check<'_>, orphans: &mut Orphans) -> Result<()> {
    let fs = check.fs;
    if !check.has_compat(compat::ORPHAN_FILE) {
        if check.has_ro_compat(ro_compat::ORPHAN_PRESENT) {
            check.findings.superblock("orphan_present is on, but orphan_file is off");
        }
        return Ok(());
    }
    let Some(ino) = Ino::new(fs.superblock.raw().orphan_file_ino.get()).filter(|ino| ino.get() <= fs.geometry().inodes)
    else {
        check.findings.superblock("orphan_file is on, but there is no orphan file");
        return Ok(());
    };
    let inode = fs.inode(ino);
    let map = inode.as_ref().ok().filter(|inode| inode.mode() != 0).map(|inode| FileMap::load(fs, inode));
    let (Ok(inode), Some(Ok(map))) = (&inode, map) else {
        damage(check, ino, "the orphan file cannot be read");
        return Ok(());
    };
    let blocks = inode.size().div_ceil(u64::from(fs.geometry().block_size));
    let mut bytes = vec![0; fs.geometry().block_len()];
    if map.data_blocks() != blocks || map.runs().iter().any(|run| run.unwritten) {
        damage(check, ino, "the orphan file has holes");
        return Ok(());
    }
    for place in map.runs().iter().flat_map(|run| (0..run.len).map(|at| run.start.plus(at))) {
        fs.read_device(&mut bytes, fs.geometry().offset(place))?;
        let seed = fs.checksum_seed().map(|seed| inode.seed(seed));
        match OrphanBlock::parse(&bytes, place, seed) {
            Ok(block) => {
                let named: Vec<Ino> = block.orphans().collect();
                if !named.is_empty() && !check.has_ro_compat(ro_compat::ORPHAN_PRESENT) {
                    damage(check, ino, "the orphan file has entries, but orphan_present is off");
                }
                orphans.extend(named);
            }
            Err(problem) => damage(check, ino, problem),
        }
    }
    Ok(())
}
