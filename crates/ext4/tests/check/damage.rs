//! Images with one structure changed: the verdict is e2fsck's, whether the structure's checksum is right or not.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use qtk_ext4::{CheckReport, Error, Finding};

use crate::corpus::{BY_MKE2FS, MOUNTABLE, e2fsck, our_verdict, populated};
use crate::layout::{Kind, Layout, Structure};
use crate::support::Image;

/// Cases for each shape, unless `QTK_CASES` says otherwise.
const CASES: u32 = 20;

pub(crate) fn cases() -> u32 {
    std::env::var("QTK_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES)
}

/// Changes with another seed are others: `QTK_SEED`, a number.
fn seed(shape: &[&str]) -> u64 {
    let extra = std::env::var("QTK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    shape.iter().flat_map(|word| word.bytes()).fold(extra, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte))
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A change, in words.
fn change(random: &mut Random, bytes: &mut [u8], layout: &Layout) -> String {
    let kinds: Vec<_> = layout.structures.keys().cloned().collect();
    let kind = random.pick(&kinds).clone();
    let structure = *random.pick(&layout.structures[&kind]);
    let (at, width) = field(random, bytes, &structure);
    let old = bytes[at..at + width].to_vec();
    for _ in 0..20 {
        let value = value(random, &old);
        bytes[at..at + width].copy_from_slice(&value);
        if value != old {
            break;
        }
    }
    let new = bytes[at..at + width].to_vec();
    let sealed = random.below(10) != 0;
    if sealed {
        layout.seal(bytes, &structure);
    }
    format!(
        "{:?} +{} {old:x?} -> {new:x?}, {}",
        structure.kind,
        at - structure.offset,
        if sealed { "sealed" } else { "not sealed" }
    )
}

/// A place in a structure, mostly one that means something, and how many bytes to change.
fn field(random: &mut Random, bytes: &[u8], structure: &Structure) -> (usize, usize) {
    let width = *random.pick(&[1, 2, 4]);
    let limit = match structure.kind {
        Kind::Inode(_) if random.below(3) != 0 => 104,
        Kind::DirLeaf(_) | Kind::DirNode(..) if random.below(2) == 0 => 96,
        Kind::ExtentNode(_) | Kind::XattrBlock(_) | Kind::PointerBlock(_) if random.below(2) == 0 => 96,
        _ => structure.len,
    };
    // Of a bitmap, also the part that matters.
    let used = bytes[structure.offset..structure.offset + structure.len].iter().rposition(|&byte| byte != 0);
    let limit = limit.min(used.map_or(structure.len, |used| used + 8)).clamp(width, structure.len);
    let at = random.below(limit / width) * width;
    (structure.offset + at, width)
}

fn value(random: &mut Random, old: &[u8]) -> Vec<u8> {
    let mut wide = [0; 8];
    wide[..old.len()].copy_from_slice(old);
    let number = u64::from_le_bytes(wide);
    let new = match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => number.wrapping_add(1),
        3 => number.wrapping_sub(1),
        4 => number ^ 1 << random.below(old.len() * 8),
        5 => number.wrapping_add(random.next() % 16),
        6 => random.next() % 256,
        _ => random.next(),
    };
    new.to_le_bytes()[..old.len()].to_vec()
}

/// What this crate counts as damage, but `e2fsck -fn` does not.
const STRICTER: &[&str] = &[
    // e2fsck looks at the log's bounds only when it plays the log. The kernel does not mount.
    "the journal's log starts outside the journal",
    "the journal has no room for a log",
    // e2fsck makes the superblock remember the error, and fails at that or not as it cannot write.
    "the journal was given up after an error",
    // e2fsck corrects it in memory before it begins to count. The kernel does not mount.
    "the checksum of its descriptor is wrong",
    // e2fsck goes by the marks all the same, and so finds groups right that are empty. The kernel does not.
    "it is marked as never written, but the file system keeps no such marks",
    // e2fsck looks at the list only when it may write.
    "the list of orphans leads to an inode that cannot be one",
    // e2fsck goes by the depth of the root alone. The kernel does not read the file.
    "an extent tree node is empty or at the wrong depth",
    // e2fsck then goes by what the layout implies. The kernel takes no blocks from such a group.
    "the checksum of its block bitmap is wrong",
];

/// Whether verdicts agree, or differ only by what is listed above.
fn agree(ours: &Result<CheckReport, Error>, e2fsck_is_clean: bool) -> bool {
    // Other damage may follow from it.
    let is_known = |finding: &Finding| STRICTER.contains(&&*finding.text);
    match ours {
        Ok(report) if e2fsck_is_clean => report.is_clean() || report.findings.iter().any(is_known),
        Ok(report) => !report.is_clean(),
        Err(Error::Unsupported { .. }) => !e2fsck_is_clean,
        Err(_) => false,
    }
}

/// Writes to the image what differs between two states of it, and gives where that is.
fn store_changes(image: &Image, old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
    let file = std::fs::File::options().write(true).open(image.path()).unwrap();
    let mut changed = Vec::new();
    for (at, (old, new)) in old.chunks(4096).zip(new.chunks(4096)).enumerate().filter(|(_, (old, new))| old != new) {
        assert_eq!(old.len(), new.len());
        file.write_all_at(new, at as u64 * 4096).unwrap();
        changed.push(at * 4096..at * 4096 + new.len());
    }
    changed
}

/// Changes an image many times, each time from the start, and gives every disagreement.
fn disagreements(
    image: &Image,
    shape: &[&str],
    cases: u32,
    changes: impl Fn(&mut Random, &mut [u8]) -> String,
) -> Vec<String> {
    let original = std::fs::read(image.path()).unwrap();
    let mut random = Random(seed(shape) | 1);
    let mut found = Vec::new();
    let mut bytes = original.clone();
    for _ in 0..cases {
        let what = changes(&mut random, &mut bytes);
        let changed = store_changes(image, &original, &bytes);
        let ours = our_verdict(image);
        let (clean, words) = e2fsck(image.path());
        store_changes(image, &bytes, &original);
        changed.into_iter().for_each(|range| bytes[range.clone()].copy_from_slice(&original[range]));
        if !agree(&ours, clean) {
            let ours = match ours {
                Ok(report) => report.findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
                Err(error) => error.to_string(),
            };
            let words: Vec<&str> = words.lines().filter(|line| !line.is_empty() && !line.starts_with("Pass")).collect();
            found
                .push(format!("{shape:?}: {what}\n    ours: {ours}\n    e2fsck {clean}: {}", words.join("\n        ")));
        }
    }
    found
}

fn assert_none(found: &[String]) {
    let mut kinds: BTreeMap<&str, u32> = BTreeMap::new();
    for text in found {
        *kinds
            .entry(text.split("]: ").nth(1).and_then(|text| text.split('(').next()).unwrap_or_default())
            .or_default() += 1;
    }
    assert!(found.is_empty(), "{}\n{} disagreements: {kinds:?}", found.join("\n"), found.len());
}

/// Small, but large enough for a cluster of 64 KiB for each file.
fn size(shape: &[&str]) -> &'static str {
    if shape.contains(&"65536") { "48M" } else { "12M" }
}

#[test]
fn verdicts_on_sealed_damage() {
    let all: Vec<String> = MOUNTABLE
        .iter()
        .chain(BY_MKE2FS)
        .filter(|shape| !shape.iter().any(|word| word.contains("quota")))
        .flat_map(|shape| {
            let image = populated(shape, size(shape));
            let layout = Layout::read(&std::fs::read(image.path()).unwrap());
            disagreements(&image, shape, cases(), |random, bytes| change(random, bytes, &layout))
        })
        .collect();
    assert_none(&all);
}

#[test]
fn verdicts_on_random_damage() {
    let all: Vec<String> = MOUNTABLE
        .iter()
        .take(6)
        .flat_map(|shape| {
            let image = populated(shape, size(shape));
            disagreements(&image, shape, cases() / 2, |random, bytes| {
                let at = random.below(2_000_000) + 1024;
                let bit = random.below(8);
                bytes[at] ^= 1 << bit;
                format!("bit {bit} of byte {at} flipped")
            })
        })
        .collect();
    assert_none(&all);
}
