//! The targets of symbolic links.

use super::Claims;
use crate::error::Result;
use crate::inode::{FLAG_ENCRYPT, FLAG_INLINE_DATA, Inode, MAP_LEN};
use crate::map::Target;

/// Whether the target lies in place of the block map.
pub(super) fn is_fast(inode: &Inode) -> bool {
    inode.full_size() < MAP_LEN as u64 && !inode.has(FLAG_INLINE_DATA)
}

pub(super) fn check(claims: &Claims<'_>, inode: &Inode, inline_tail: Option<&[u8]>) -> Result<()> {
    if !is_sound(claims, inode, inline_tail)? {
        claims.findings.inode(inode.ino(), "the target of the symbolic link is damaged");
    }
    Ok(())
}

fn is_sound(claims: &Claims<'_>, inode: &Inode, inline_tail: Option<&[u8]>) -> Result<bool> {
    let fs = claims.check.fs;
    let size = inode.full_size();
    let Ok(len) = usize::try_from(size) else { return Ok(false) };
    if len == 0 || size > fs.geometry().block_size.into() {
        return Ok(false);
    }
    if inode.has(FLAG_INLINE_DATA) {
        let tail = inline_tail.unwrap_or_default();
        return Ok(len <= MAP_LEN + tail.len());
    }
    let mut bytes;
    let content: &[u8] = if is_fast(inode) {
        inode.map()
    } else {
        let Ok(segment) = fs.segment(inode, 0) else { return Ok(false) };
        let Target::Data(place) = segment.target else { return Ok(false) };
        bytes = vec![0; fs.geometry().block_len()];
        fs.read_device(&mut bytes, fs.geometry().offset(place))?;
        &bytes
    };
    if inode.has(FLAG_ENCRYPT) {
        // The length of the encrypted target, and then that.
        let stored = content.first_chunk().map_or(0, |&stored| u16::from_le_bytes(stored));
        return Ok(usize::from(stored) + 2 == len);
    }
    Ok(content.iter().position(|&byte| byte == 0) == Some(len))
}
