//! Images copied while the kernel had them mounted: what the next mount will see is clean.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::corpus::{e2fsck, make_tree, our_verdict};
use crate::support::{Image, noise, tool};

/// A copy of an image in the middle of its use, with a file open that has no name any more.
fn crashed(shape: &[&str]) -> Image {
    let image = Image::make("48M", shape, None);
    image.mounted(|root| {
        make_tree(root);
        let unnamed = File::options().create_new(true).write(true).open(root.join("unnamed")).unwrap();
        unnamed.write_all_at(&noise(50_000, 1), 0).unwrap();
        unnamed.sync_all().unwrap();
        std::fs::remove_file(root.join("unnamed")).unwrap();
        tool("sync", &["-f", root.to_str().unwrap()]);
        std::fs::write(root.join("later"), b"committed by nobody").unwrap();
        image.copy()
    })
}

#[test]
fn a_running_systems_disk_is_clean_after_replay() {
    for shape in [&["-b", "1024"][..], &["-b", "4096", "-O", "orphan_file,metadata_csum_seed"], &["-t", "ext3"]] {
        let image = crashed(shape);
        let report = our_verdict(&image).unwrap();
        assert!(report.is_clean() && report.is_complete && report.journal_replayed, "{shape:?}: {report:#?}");
        let notes: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert!(notes.iter().any(|note| note.contains("1 inodes wait")), "{shape:?}: {notes:?}");
        let args = ["-fy", image.path().to_str().unwrap()];
        let output = Command::new("e2fsck").args(args).env("PATH", "/usr/sbin:/sbin").output().unwrap();
        assert!(output.status.code().is_some_and(|code| code < 4), "{output:?}");
        let (clean, words) = e2fsck(image.path());
        assert!(clean, "{shape:?}: {words}");
        let report = our_verdict(&image).unwrap();
        assert!(report.is_clean() && report.notes == 0 && !report.journal_replayed, "{shape:?}: {report:#?}");
    }
}

#[test]
fn reports_do_not_depend_on_threads() {
    let image = Image::make("16M", &["-b", "1024", "-O", "^metadata_csum"], None);
    image.mounted(make_tree);
    // Every inode's first extent leads to the same few blocks.
    let mut bytes = std::fs::read(image.path()).unwrap();
    let layout = crate::layout::Layout::read(&bytes);
    for (inode, block) in layout.structures["Inode"].iter().skip(11).zip((3000_u32..3005).cycle()) {
        bytes[inode.offset + 60..inode.offset + 64].copy_from_slice(&block.to_le_bytes());
    }
    std::fs::write(image.path(), &bytes).unwrap();
    let with_threads = |threads| {
        let mut options = qtk_ext4::CheckOptions::default();
        options.threads = std::num::NonZeroUsize::new(threads).unwrap();
        options.limit = 50;
        qtk_ext4::check(image.device(), &options).unwrap()
    };
    let report = with_threads(1);
    assert!(report.damages > 50 && report.findings.len() == 50);
    for threads in [2, 3, 8] {
        assert_eq!(with_threads(threads), report);
    }
}
