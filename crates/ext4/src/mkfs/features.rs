//! Which features a new file system gets.

use super::{MkfsError, Profile, Result, Type};
use crate::features::{Features, compat, incompat, ro_compat};

/// `base_features` of every `mke2fs.conf` since 2008.
const BASE: Features = Features {
    compat: compat::EXT_ATTR | compat::RESIZE_INODE | compat::DIR_INDEX,
    incompat: incompat::FILETYPE,
    ro_compat: ro_compat::SPARSE_SUPER | ro_compat::LARGE_FILE,
};

const JOURNAL: Features = Features { compat: compat::HAS_JOURNAL, incompat: 0, ro_compat: 0 };

/// What ext4 has besides, in every profile.
const EXT4: Features = Features {
    compat: compat::HAS_JOURNAL,
    incompat: incompat::EXTENTS | incompat::FLEX_BG | incompat::SIXTY_FOUR_BIT,
    ro_compat: ro_compat::HUGE_FILE | ro_compat::METADATA_CSUM | ro_compat::DIR_NLINK | ro_compat::EXTRA_ISIZE,
};

/// What came with e2fsprogs 1.47, and Debian 12 takes back.
const LATE: Features = Features { compat: compat::ORPHAN_FILE, incompat: incompat::CSUM_SEED, ro_compat: 0 };

/// Everything that [`format()`](super::format()) can lay out.
const SUPPORTED: Features = Features {
    compat: BASE.compat | EXT4.compat | LATE.compat | compat::SPARSE_SUPER2 | compat::STABLE_INODES,
    incompat: BASE.incompat
        | EXT4.incompat
        | LATE.incompat
        | incompat::META_BG
        | incompat::LARGE_DIR
        | incompat::EA_INODE,
    ro_compat: BASE.ro_compat | EXT4.ro_compat | ro_compat::GDT_CSUM,
};

/// The features of a type and profile, changed by `edits`: names separated by commas, each after `^` to take it away, and
/// `none` to take all away.
pub(super) fn choose(kind: Type, profile: Profile, edits: &str) -> Result<Features> {
    let late = if profile == Profile::Debian12 { Features::default() } else { LATE };
    let mut features = match kind {
        Type::Ext2 => BASE,
        Type::Ext3 => BASE.with(JOURNAL),
        Type::Ext4 => BASE.with(EXT4).with(late),
    };
    for word in edits.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        if word == "none" {
            features = Features::default();
            continue;
        }
        let (name, off) = word.strip_prefix('^').map_or((word, false), |name| (name, true));
        let feature = Features::named(name).ok_or_else(|| MkfsError::UnknownFeature(name.to_owned()))?;
        features = if off { features.without(feature) } else { features.with(feature) };
    }
    settle(features)
}

/// Refuses what cannot be made or does not go together, and drops what another feature replaces.
fn settle(mut features: Features) -> Result<Features> {
    let unsupported = features.without(SUPPORTED).names();
    if !unsupported.is_empty() {
        return Err(MkfsError::Unsupported(unsupported.join(", ")));
    }
    if features.has_ro_compat(ro_compat::METADATA_CSUM) {
        features.ro_compat &= !ro_compat::GDT_CSUM;
    } else {
        features.incompat &= !incompat::CSUM_SEED;
    }
    if !features.has_compat(compat::HAS_JOURNAL) {
        features.compat &= !compat::ORPHAN_FILE;
    }
    if features.has_incompat(incompat::SIXTY_FOUR_BIT) && !features.has_incompat(incompat::EXTENTS) {
        return Err(MkfsError::invalid("64bit needs extents: add ^64bit, or keep extent"));
    }
    if features.has_compat(compat::RESIZE_INODE) {
        if features.has_incompat(incompat::META_BG) {
            return Err(MkfsError::invalid("resize_inode and meta_bg exclude each other: add ^resize_inode"));
        }
        if !features.has_ro_compat(ro_compat::SPARSE_SUPER) && !features.has_compat(compat::SPARSE_SUPER2) {
            return Err(MkfsError::invalid("resize_inode needs sparse_super: add ^resize_inode, or keep sparse_super"));
        }
    }
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_go_in_order() {
        let features = choose(Type::Ext4, Profile::Ubuntu2404, "^has_journal,^metadata_csum,uninit_bg").unwrap();
        assert!(!features.has_compat(compat::HAS_JOURNAL | compat::ORPHAN_FILE));
        assert!(features.has_ro_compat(ro_compat::GDT_CSUM) && !features.has_incompat(incompat::CSUM_SEED));
        let bare = choose(Type::Ext4, Profile::Debian12, "none,filetype").unwrap();
        assert_eq!(bare, Features { incompat: incompat::FILETYPE, ..Features::default() });
    }

    #[test]
    fn says_what_it_cannot_do() {
        let message = |edits| choose(Type::Ext4, Profile::Debian13, edits).unwrap_err().to_string();
        assert!(message("bigalloc,quota").contains("quota, bigalloc"));
        assert!(message("^nonsense").contains("nonsense"));
        assert!(message("meta_bg").contains("^resize_inode"));
    }
}
