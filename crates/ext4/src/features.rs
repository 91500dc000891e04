//! Feature bits of the superblock: what they are called, which of them can be read and which can be written.

use crate::Error;

pub(crate) mod compat {
    pub(crate) const HAS_JOURNAL: u32 = 0x4;
    pub(crate) const EXT_ATTR: u32 = 0x8;
    pub(crate) const RESIZE_INODE: u32 = 0x10;
    pub(crate) const DIR_INDEX: u32 = 0x20;
    pub(crate) const SPARSE_SUPER2: u32 = 0x200;
    pub(crate) const STABLE_INODES: u32 = 0x800;
    pub(crate) const ORPHAN_FILE: u32 = 0x1000;
}

pub(crate) mod incompat {
    pub(crate) const FILETYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const SIXTY_FOUR_BIT: u32 = 0x80;
    pub(crate) const MMP: u32 = 0x100;
    pub(crate) const FLEX_BG: u32 = 0x200;
    pub(crate) const EA_INODE: u32 = 0x400;
    pub(crate) const CSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGE_DIR: u32 = 0x4000;
    pub(crate) const INLINE_DATA: u32 = 0x8000;
    pub(crate) const ENCRYPT: u32 = 0x1_0000;
    pub(crate) const CASEFOLD: u32 = 0x2_0000;
}

pub(crate) mod ro_compat {
    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const LARGE_FILE: u32 = 0x2;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const GDT_CSUM: u32 = 0x10;
    pub(crate) const DIR_NLINK: u32 = 0x20;
    pub(crate) const EXTRA_ISIZE: u32 = 0x40;
    pub(crate) const QUOTA: u32 = 0x100;
    pub(crate) const BIGALLOC: u32 = 0x200;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
    pub(crate) const PROJECT: u32 = 0x2000;
    pub(crate) const VERITY: u32 = 0x8000;
    pub(crate) const ORPHAN_PRESENT: u32 = 0x1_0000;
}

/// What this crate does with a feature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Support {
    None,
    Read,
    Write,
}

struct Feature {
    bit: u32,
    name: &'static str,
    support: Support,
}

const fn feature(bit: u32, name: &'static str, support: Support) -> Feature {
    Feature { bit, name, support }
}

const COMPAT: &[Feature] = &[
    feature(0x1, "dir_prealloc", Support::Write),
    feature(0x2, "imagic_inodes", Support::Read),
    feature(compat::HAS_JOURNAL, "has_journal", Support::Write),
    feature(compat::EXT_ATTR, "ext_attr", Support::Write),
    feature(compat::RESIZE_INODE, "resize_inode", Support::Write),
    feature(compat::DIR_INDEX, "dir_index", Support::Write),
    feature(0x40, "lazy_bg", Support::Read),
    feature(0x80, "exclude_inode", Support::Read),
    feature(0x100, "exclude_bitmap", Support::Read),
    feature(compat::SPARSE_SUPER2, "sparse_super2", Support::Write),
    // Fast commits matter to a dirty journal alone, and the journal looks for them.
    feature(0x400, "fast_commit", Support::Write),
    feature(compat::STABLE_INODES, "stable_inodes", Support::Write),
    feature(compat::ORPHAN_FILE, "orphan_file", Support::Write),
];

const INCOMPAT: &[Feature] = &[
    feature(0x1, "compression", Support::None),
    feature(incompat::FILETYPE, "filetype", Support::Write),
    feature(incompat::RECOVER, "needs_recovery", Support::Write),
    feature(0x8, "journal_dev", Support::None),
    feature(incompat::META_BG, "meta_bg", Support::Read),
    feature(incompat::EXTENTS, "extent", Support::Write),
    feature(incompat::SIXTY_FOUR_BIT, "64bit", Support::Write),
    feature(incompat::MMP, "mmp", Support::Read),
    feature(incompat::FLEX_BG, "flex_bg", Support::Write),
    feature(incompat::EA_INODE, "ea_inode", Support::Read),
    feature(0x1000, "dirdata", Support::None),
    feature(incompat::CSUM_SEED, "metadata_csum_seed", Support::Write),
    feature(incompat::LARGE_DIR, "large_dir", Support::Read),
    feature(incompat::INLINE_DATA, "inline_data", Support::Read),
    feature(incompat::ENCRYPT, "encrypt", Support::Read),
    feature(incompat::CASEFOLD, "casefold", Support::Read),
];

const RO_COMPAT: &[Feature] = &[
    feature(ro_compat::SPARSE_SUPER, "sparse_super", Support::Write),
    feature(ro_compat::LARGE_FILE, "large_file", Support::Write),
    feature(0x4, "btree_dir", Support::Read),
    feature(ro_compat::HUGE_FILE, "huge_file", Support::Write),
    feature(ro_compat::GDT_CSUM, "uninit_bg", Support::Write),
    feature(ro_compat::DIR_NLINK, "dir_nlink", Support::Write),
    feature(ro_compat::EXTRA_ISIZE, "extra_isize", Support::Write),
    // Those that no kernel in use writes to may hide blocks from the bitmaps.
    feature(0x80, "has_snapshot", Support::None),
    feature(ro_compat::QUOTA, "quota", Support::Read),
    feature(ro_compat::BIGALLOC, "bigalloc", Support::Read),
    feature(ro_compat::METADATA_CSUM, "metadata_csum", Support::Write),
    feature(0x800, "replica", Support::None),
    feature(0x1000, "read-only", Support::Read),
    feature(ro_compat::PROJECT, "project", Support::Read),
    feature(0x4000, "shared_blocks", Support::Read),
    feature(ro_compat::VERITY, "verity", Support::Read),
    feature(ro_compat::ORPHAN_PRESENT, "orphan_present", Support::Write),
];

/// The three sets of feature bits of a superblock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) compat: u32,
    pub(crate) incompat: u32,
    pub(crate) ro_compat: u32,
}

impl Features {
    /// The feature of that name alone. `extents` and `gdt_csum` are other names of `extent` and `uninit_bg`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let name = match name {
            "extents" => "extent",
            "gdt_csum" => "uninit_bg",
            name => name,
        };
        let bit =
            |table: &[Feature]| table.iter().find(|feature| feature.name == name).map_or(0, |feature| feature.bit);
        let found = Self { compat: bit(COMPAT), incompat: bit(INCOMPAT), ro_compat: bit(RO_COMPAT) };
        (found != Self::default()).then_some(found)
    }

    /// These features and `other`.
    pub(crate) fn with(self, other: Self) -> Self {
        Self {
            compat: self.compat | other.compat,
            incompat: self.incompat | other.incompat,
            ro_compat: self.ro_compat | other.ro_compat,
        }
    }

    /// These features but for `other`.
    pub(crate) fn without(self, other: Self) -> Self {
        Self {
            compat: self.compat & !other.compat,
            incompat: self.incompat & !other.incompat,
            ro_compat: self.ro_compat & !other.ro_compat,
        }
    }

    /// The names of the features in the sets, as far as they have names.
    pub(crate) fn names(self) -> Vec<&'static str> {
        let sets = [(self.compat, COMPAT), (self.incompat, INCOMPAT), (self.ro_compat, RO_COMPAT)];
        let in_set = |(mask, table): (u32, &'static [Feature])| {
            table.iter().filter(move |feature| mask & feature.bit != 0).map(|feature| feature.name)
        };
        sets.into_iter().flat_map(in_set).collect()
    }

    pub(crate) fn has_compat(self, bit: u32) -> bool {
        self.compat & bit != 0
    }

    pub(crate) fn has_incompat(self, bit: u32) -> bool {
        self.incompat & bit != 0
    }

    pub(crate) fn has_ro_compat(self, bit: u32) -> bool {
        self.ro_compat & bit != 0
    }

    /// Refuses what changes the format in ways that a reader must know. Unknown compatible and read-only-compatible bits are fine.
    pub(crate) fn check_readable(self) -> Result<(), Error> {
        let missing = below(self.incompat, INCOMPAT, Support::Read, "incompat");
        if missing.is_empty() { Ok(()) } else { Err(Error::unsupported(describe(&missing))) }
    }

    /// Refuses what may give a meaning to blocks that the bitmaps call free.
    pub(crate) fn check_free_space(self) -> Result<(), Error> {
        let missing = below(self.ro_compat, RO_COMPAT, Support::Read, "ro_compat");
        if missing.is_empty() { Ok(()) } else { Err(Error::unsupported(describe(&missing))) }
    }

    /// Refuses everything that is not understood, even what readers may pass over: it may change what is correct.
    pub(crate) fn check_known(self) -> Result<(), Error> {
        let missing = self.missing(Support::Read);
        if missing.is_empty() { Ok(()) } else { Err(Error::unsupported(describe(&missing))) }
    }

    /// Refuses everything that a writer does not keep up.
    pub(crate) fn check_writable(self) -> Result<(), Error> {
        self.check_readable()?;
        let missing = self.missing(Support::Write);
        if missing.is_empty() { Ok(()) } else { Err(Error::unsupported_for_writing(describe(&missing))) }
    }
}

impl Features {
    /// The names of those that have less than the `wanted` support.
    fn missing(self, wanted: Support) -> Vec<String> {
        [
            below(self.compat, COMPAT, wanted, "compat"),
            below(self.incompat, INCOMPAT, wanted, "incompat"),
            below(self.ro_compat, RO_COMPAT, wanted, "ro_compat"),
        ]
        .concat()
    }
}

fn describe(names: &[String]) -> String {
    let noun = if names.len() == 1 { "the file system feature" } else { "the set of file system features" };
    format!("{noun} {}", names.join(", "))
}

/// The names of the bits in `mask` that have less than the `wanted` support.
fn below(mask: u32, table: &[Feature], wanted: Support, set: &str) -> Vec<String> {
    (0..u32::BITS)
        .map(|shift| 1 << shift)
        .filter(|bit| mask & bit != 0)
        .filter_map(|bit| match table.iter().find(|feature| feature.bit == bit) {
            Some(feature) if feature.support >= wanted => None,
            Some(feature) => Some(feature.name.to_owned()),
            None => Some(format!("{set} 0x{bit:x}")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_by_name() {
        let plain = Features { compat: 0x1c | 0x20, incompat: 0x2c2, ro_compat: 0x46b };
        assert!(plain.check_writable().is_ok());
        let quota = Features { ro_compat: 0x100, ..plain };
        assert!(quota.check_readable().is_ok());
        assert_eq!(
            quota.check_writable().unwrap_err().to_string(),
            "the file system feature quota is not supported for writing"
        );
        let odd = Features { incompat: 0x8000_0001, ..plain };
        assert_eq!(
            odd.check_readable().unwrap_err().to_string(),
            "the set of file system features compression, incompat 0x80000000 is not supported"
        );
    }

    #[test]
    fn every_bit_is_listed_once() {
        for table in [COMPAT, INCOMPAT, RO_COMPAT] {
            let all = table.iter().fold(0_u32, |seen, feature| {
                assert_eq!(seen & feature.bit, 0, "{}", feature.name);
                seen | feature.bit
            });
            assert_eq!(all.count_ones() as usize, table.len());
        }
    }
}
