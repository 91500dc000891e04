//! Swap spaces (`linux/swap.h`): a header in the first page, and nothing else that outlives a shutdown.

use std::io;
use std::ops::Range;

use qtk_block::{BlockRead, read_padded};

const PAGE_SIZES: [usize; 5] = [4096, 8192, 16_384, 32_768, 65_536];
/// The largest first page.
pub(super) const HEAD: usize = 65_536;
const SIGNATURE_LEN: usize = 10;
const SIGNATURE: &[u8] = b"SWAPSPACE2";
/// What stands in the signature's place while memory is kept in the swap space: by the kernel, by uswsusp, by TuxOnIce.
const ASLEEP: [&[u8]; 5] =
    [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"];
const VERSION: usize = 1024;
const LAST_PAGE: usize = 1028;

/// What the first page of a device says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Swap {
    /// It is no swap space.
    None,
    /// All behind the header, in bytes.
    Unused(Range<u64>),
    /// Memory of a machine that sleeps.
    Asleep,
    /// A swap space that no kernel would use.
    Damaged(&'static str),
}

pub(super) fn read(device: &dyn BlockRead) -> io::Result<Swap> {
    let mut head = vec![0; HEAD];
    read_padded(device, &mut head, 0)?;
    if is_asleep(&head) {
        return Ok(Swap::Asleep);
    }
    let page = PAGE_SIZES.into_iter().find(|&page| signature(&head, page).starts_with(SIGNATURE));
    Ok(page.map_or(Swap::None, |page| of_header(&head, page, device.size())))
}

/// Whether the first bytes of a swap space or swap file belong to a machine that sleeps in it.
pub(super) fn is_asleep(head: &[u8]) -> bool {
    PAGE_SIZES.iter().any(|&page| ASLEEP.iter().any(|mark| signature(head, page).starts_with(mark)))
}

/// The end of the first page.
fn signature(head: &[u8], page: usize) -> &[u8] {
    head.get(page.saturating_sub(SIGNATURE_LEN)..page).unwrap_or_default()
}

fn of_header(head: &[u8], page: usize, size: u64) -> Swap {
    let field = |at: usize| head.get(at..).and_then(<[u8]>::first_chunk).copied().map(u32::from_le_bytes);
    if field(VERSION) != Some(1) {
        return Swap::Damaged("the version of the swap space is not 1");
    }
    let page = page as u64;
    let pages = field(LAST_PAGE).map_or(0, u64::from).saturating_add(1);
    let end = pages.saturating_mul(page);
    if end > size {
        return Swap::Damaged("the swap space is larger than its partition");
    }
    if end > page { Swap::Unused(page..end) } else { Swap::Damaged("the swap space has no pages") }
}
