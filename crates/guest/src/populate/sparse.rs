//! Files with holes in tar archives, in the four ways that GNU tar has written them.

use std::ops::Range;

use super::header::{BLOCK, BLOCK_LEN, Damage, Records, decimal, number};

/// A range of the file and where it lies in the archive.
pub(super) type Piece = (Range<u64>, u64);

/// Where a file with holes has data, as (offset, length).
pub(super) type Map = Vec<(u64, u64)>;

/// No archive has more; each piece takes some bytes of it, so memory stays in proportion.
const MAX_PIECES: u64 = 1 << 22;

const MALFORMED: Damage = "the map of a sparse file is malformed";

/// Lays pieces of (offset, length) that follow each other in the archive from `start` on. They must be in order and fit.
pub(super) fn lay_out(map: &[(u64, u64)], start: u64, stored: u64, size: u64) -> Result<Vec<Piece>, Damage> {
    let mut pieces = Vec::with_capacity(map.len());
    let (mut at, mut end) = (start, 0);
    for &(offset, len) in map {
        let piece_end = offset.checked_add(len).filter(|&piece_end| piece_end <= size).ok_or(MALFORMED)?;
        if offset < end {
            return Err(MALFORMED);
        }
        if len > 0 {
            pieces.push((offset..piece_end, at));
        }
        at = at.checked_add(len).ok_or(MALFORMED)?;
        end = piece_end;
    }
    if at - start > stored { Err(MALFORMED) } else { Ok(pieces) }
}

/// The entries of an old GNU header or of a block that continues it, and whether another follows.
pub(super) fn old_entries(block: &[u8; BLOCK_LEN], is_first: bool) -> Result<(Map, bool), Damage> {
    let (entries, more) = if is_first { (&block[386..482], block[482]) } else { (&block[..504], block[504]) };
    let mut map = Vec::new();
    for entry in entries.chunks_exact(24) {
        if entry[0] == 0 {
            break;
        }
        let field = |bytes| number(bytes).and_then(|value| u64::try_from(value).ok()).ok_or(MALFORMED);
        map.push((field(&entry[..12])?, field(&entry[12..])?));
    }
    Ok((map, more != 0))
}

/// The map that pax records of the versions 0.0 and 0.1 hold, if they do.
pub(super) fn of_records(records: &Records) -> Result<Option<Map>, Damage> {
    let numbers = match records.get("GNU.sparse.map") {
        Some(map) => map.split(|&byte| byte == b',').map(decimal).collect::<Option<Vec<_>>>().ok_or(MALFORMED)?,
        None if records.sparse.is_empty() => return Ok(None),
        None => records.sparse.clone(),
    };
    let (pairs, rest) = numbers.as_chunks::<2>();
    if rest.is_empty() { Ok(Some(pairs.iter().map(|&[offset, len]| (offset, len)).collect())) } else { Err(MALFORMED) }
}

/// Reads the map of version 1.0, which comes before the content as lines of numbers; and how many bytes it takes, padded.
/// `read` gives the next bytes of the archive's entry, and none at its end.
pub(super) fn read_map(mut read: impl FnMut() -> Result<Vec<u8>, Damage>) -> Result<(Map, u64), Damage> {
    let mut text: Vec<u8> = Vec::new();
    let mut blocks = 0;
    let mut at = 0;
    let mut next = || loop {
        if let Some(len) = text[at..].iter().position(|&byte| byte == b'\n') {
            let line = decimal(&text[at..at + len]).ok_or(MALFORMED)?;
            at += len + 1;
            return Ok::<u64, Damage>(line);
        }
        let more = read()?;
        if more.is_empty() || text.len() - at > 64 {
            return Err(MALFORMED);
        }
        blocks += 1;
        text.drain(..at);
        at = 0;
        text.extend(more);
    };
    let count = next()?;
    if count > MAX_PIECES {
        return Err(MALFORMED);
    }
    let mut map = Vec::new();
    for _ in 0..count {
        map.push((next()?, next()?));
    }
    Ok((map, blocks * BLOCK))
}
