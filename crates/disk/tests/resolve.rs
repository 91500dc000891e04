//! Paths against the kernel's own resolution of the same tree, confined to it: `openat2` with `RESOLVE_IN_ROOT`.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use common::{Image, MIB};
use proptest::prelude::*;
use qtk_disk::{Error, Follow, PathProblem, Tree};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// What a path leads to: a path without links, or what is wrong.
type Outcome = Result<String, PathProblem>;

fn kernel(root: &File, root_path: &Path, path: &str, follow: Follow) -> Outcome {
    let flags = OFlags::PATH | OFlags::CLOEXEC | if follow == Follow::All { OFlags::empty() } else { OFlags::NOFOLLOW };
    loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(fd) => {
                let full = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
                return Ok(format!("/{}", full.strip_prefix(root_path).unwrap().display()));
            }
            // Something was renamed elsewhere meanwhile.
            Err(Errno::AGAIN) => {}
            Err(Errno::NOENT) => return Err(PathProblem::NotFound),
            Err(Errno::NOTDIR) => return Err(PathProblem::NotADirectory),
            Err(Errno::LOOP) => return Err(PathProblem::TooManyLinks),
            Err(other) => panic!("openat2 of {path}: {other}"),
        }
    }
}

fn ours(tree: &Tree, path: &str, follow: Follow) -> Outcome {
    let location = tree.locate(path, follow).and_then(|location| location.existing().map(|_| location));
    match location {
        Ok(location) => Ok(location.path.to_string()),
        Err(Error::Path { problem, .. }) => Err(problem),
        Err(other) => panic!("{path}: {other}"),
    }
}

fn path() -> impl Strategy<Value = String> {
    let name = prop_oneof![4 => "[a-d]", 1 => Just(".".to_owned()), 2 => Just("..".to_owned())];
    (prop::collection::vec(name, 1..6), any::<bool>(), any::<bool>()).prop_map(|(names, absolute, slash)| {
        format!("{}{}{}", if absolute { "/" } else { "" }, names.join("/"), if slash { "/" } else { "" })
    })
}

/// A place for a file, directory or link, three names deep at most.
fn entry() -> impl Strategy<Value = (String, Option<String>, bool)> {
    let place = prop::collection::vec("[a-d]", 1..4).prop_map(|names| names.join("/"));
    (place, prop::option::weighted(0.6, path()), any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn leads_where_the_kernel_leads(
        entries in prop::collection::vec(entry(), 5..40),
        paths in prop::collection::vec(path(), 200),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let root_path = folder.path().canonicalize().unwrap();
        for (place, link, is_dir) in entries {
            // Places that are taken, or lie below a file, stay as they are.
            let at = root_path.join(place);
            let parent = at.parent().unwrap();
            if parent.ancestors().take_while(|dir| *dir != root_path).any(|dir| dir.symlink_metadata().is_ok_and(|found| !found.is_dir())) {
                continue;
            }
            std::fs::create_dir_all(parent).unwrap();
            let _ = match link {
                Some(target) => std::os::unix::fs::symlink(target, at),
                None if is_dir => std::fs::create_dir(at),
                None => File::create_new(at).map(drop),
            };
        }
        let image = Image::ext4(4 * MIB, "", &root_path);
        let tree = Tree::open(image.reader(), None).unwrap();
        let root = File::open(&root_path).unwrap();
        for path in paths {
            for follow in [Follow::All, Follow::NotLast] {
                prop_assert_eq!(ours(&tree, &path, follow), kernel(&root, &root_path, &path, follow), "{} {:?}", path, follow);
            }
        }
    }
}
