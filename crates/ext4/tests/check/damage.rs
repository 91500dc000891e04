//! Images with one structure changed: the verdict is e2fsck's, whether the structure's checksum is right or not.

use std::collections::BTreeMap;

use qtk_ext4::Error;

use crate::corpus::{BY_MKE2FS, MOUNTABLE, e2fsck, our_verdict, populated};
use crate::layout::{Kind, Layout, Structure};
use crate::support::Image;

/// Cases for each shape, unless `QTK_CASES` says otherwise.
const CASES: u32 = 40;

pub(crate) fn cases() -> u32 {
    std::env::var("QTK_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES)
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

/// Changes an image many times, each time from the start, and gives every disagreement.
fn disagreements(
    image: &Image,
    shape: &[&str],
    cases: u32,
    changes: impl Fn(&mut Random, &mut [u8]) -> String,
) -> Vec<String> {
    let original = std::fs::read(image.path()).unwrap();
    let seed =
        shape.iter().flat_map(|word| word.bytes()).fold(7, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte));
    let mut random = Random(seed | 1);
    let mut found = Vec::new();
    for _ in 0..cases {
        let mut bytes = original.clone();
        let what = changes(&mut random, &mut bytes);
        let ours = our_verdict(&bytes);
        std::fs::write(image.path(), &bytes).unwrap();
        let (clean, words) = e2fsck(image.path());
        let agrees = match &ours {
            Ok(report) => report.is_clean() == clean,
            Err(Error::Unsupported { .. }) => !clean,
            Err(_) => false,
        };
        if !agrees {
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

#[test]
fn verdicts_on_sealed_damage() {
    let all: Vec<String> = MOUNTABLE
        .iter()
        .chain(BY_MKE2FS)
        .filter(|shape| !shape.iter().any(|word| word.contains("quota")))
        .flat_map(|shape| {
            let image = populated(shape, "12M");
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
            let image = populated(shape, "12M");
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
