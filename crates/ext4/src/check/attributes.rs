//! Extended attributes, within inodes and in blocks of their own.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::Claims;
use crate::error::{Error, Result};
use crate::inode::{FLAG_EA_INODE, FLAG_ENCRYPT, FLAG_INLINE_DATA, Inode};
use crate::metadata::FileType;
use crate::xattr::{self, Attribute, Name, Value, XattrBlock};
use crate::{BlockNr, FindingKind, Ino, Place};

/// What an inode's attributes mean for the rest of it.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// What does not fit in place of the block map, of content kept within the inode.
    pub(super) inline_tail: Option<Vec<u8>>,
    /// Clusters that belong to the inode because of its attributes.
    pub(super) clusters: u64,
}

/// Blocks of attributes and inodes with values: how often they are used, and how often they say so.
#[derive(Debug, Default)]
pub(super) struct Uses {
    blocks: Mutex<HashMap<BlockNr, BlockUses>>,
    values: Mutex<HashMap<Ino, u64>>,
}

#[derive(Debug)]
struct BlockUses {
    used: u32,
    stored: u32,
    has_context: bool,
}

pub(super) fn check(claims: &Claims<'_>, inode: &Inode) -> Result<Found> {
    let mut found = Found::default();
    let mut has_context = false;
    match xattr::check_in_inode(inode.xattr_area()) {
        Ok(attributes) => {
            for attribute in &attributes {
                value_inode(claims, attribute);
                has_context |= attribute.name == Name::ENCRYPTION_CONTEXT;
                if attribute.name == Name::INLINE_DATA
                    && let Value::Here(value) = &attribute.value
                {
                    found.inline_tail = Some(value.clone());
                }
            }
        }
        Err(damage) => claims.findings.attribute(inode.ino(), damage),
    }
    if inode.has(FLAG_INLINE_DATA) && found.inline_tail.is_none() {
        claims.findings.attribute(inode.ino(), "the attribute with the inline data is missing");
    }
    if let Some(block) = inode.xattr_block() {
        found.clusters = 1;
        has_context |= attribute_block(claims, inode, block)?;
    }
    if inode.has(FLAG_ENCRYPT) && !has_context {
        claims.findings.attribute(inode.ino(), "it is encrypted, but has no encryption context");
    }
    Ok(found)
}

fn value_inode(claims: &Claims<'_>, attribute: &Attribute) {
    if let Value::Inode(ino, _) = attribute.value {
        let mut values = claims.uses.values.lock().unwrap_or_else(PoisonError::into_inner);
        *values.entry(ino).or_default() += 1;
    }
}

/// Checks a block the first time it is met, and counts its uses. Gives whether an encryption context is in it.
fn attribute_block(claims: &Claims<'_>, inode: &Inode, block: BlockNr) -> Result<bool> {
    let fs = claims.check.fs;
    if !fs.geometry().contains(block, 1) {
        claims.findings.attribute(inode.ino(), "the block of its attributes lies outside the file system");
        return Ok(false);
    }
    let mut blocks = claims.uses.blocks.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(uses) = blocks.get_mut(&block) {
        uses.used += 1;
        return Ok(uses.has_context);
    }
    let mut bytes = vec![0; fs.geometry().block_len()];
    fs.read_device(&mut bytes, fs.geometry().offset(block))?;
    if let Some(shared) = claims.blocks.claim(block, 1) {
        let text = format!("block {shared} is claimed by something else too");
        claims.findings.damage(FindingKind::SharedBlock, Place::Inode(inode.ino()), text);
    }
    let parsed = XattrBlock::parse(bytes, block, fs.checksum_seed())
        .and_then(|parsed| parsed.check().map(|attributes| (parsed.references(), attributes)));
    let (stored, attributes) = match parsed {
        Ok(parsed) => parsed,
        Err(damage) => {
            claims.findings.block(FindingKind::Attribute, block, damage);
            (1, Vec::new())
        }
    };
    attributes.iter().for_each(|attribute| value_inode(claims, attribute));
    let has_context = attributes.iter().any(|attribute| attribute.name == Name::ENCRYPTION_CONTEXT);
    blocks.insert(block, BlockUses { used: 1, stored, has_context });
    Ok(has_context)
}

/// Compares the counts once every inode was seen.
pub(super) fn check_uses(claims: &Claims<'_>) -> Result<()> {
    let blocks = claims.uses.blocks.lock().unwrap_or_else(PoisonError::into_inner);
    for (&block, uses) in &*blocks {
        if uses.used != uses.stored {
            let text = format!("{} inodes use these attributes, but {} are counted", uses.used, uses.stored);
            claims.findings.block(FindingKind::Attribute, block, text);
        }
    }
    drop(blocks);
    claims.uses.values().into_iter().try_for_each(|ino| value(claims, ino))
}

/// Compares how often an inode's value is used with what the inode says.
fn value(claims: &Claims<'_>, ino: Ino) -> Result<()> {
    let inode = match claims.check.fs.inode(ino) {
        Ok(inode) => inode,
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(_) => {
            claims.findings.attribute(ino, "an attribute has its value in an inode that cannot be");
            return Ok(());
        }
    };
    if !inode.has(FLAG_EA_INODE) || !inode.is(FileType::Regular) || inode.links() == 0 {
        claims.findings.attribute(ino, "an attribute has its value in this inode, which is not for values");
    } else if inode.value_references() != claims.uses.of_value(ino) {
        claims.findings.attribute(ino, "more or fewer attributes than it counts have their value here");
    }
    Ok(())
}

impl Uses {
    /// How many attributes have their value in an inode.
    pub(super) fn of_value(&self, ino: Ino) -> u64 {
        self.values.lock().unwrap_or_else(PoisonError::into_inner).get(&ino).copied().unwrap_or_default()
    }

    /// Every inode that attributes say to hold their value, in order.
    pub(super) fn values(&self) -> Vec<Ino> {
        let mut all: Vec<_> = self.values.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        all.sort_unstable();
        all
    }
}
