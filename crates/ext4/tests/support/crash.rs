//! Images copied while the kernel had them mounted, as a crash leaves them.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{DISTRIBUTION, Image, noise, tool};

/// Shapes with a journal: checksummed (v3), not checksummed, small blocks, an orphan list instead of a file.
pub(crate) const SHAPES: &[&[&str]] = &[
    DISTRIBUTION,
    &["-b", "1024"],
    &["-O", "^metadata_csum,^64bit", "-b", "2048"],
    &["-t", "ext3"],
    &["-J", "size=4", "-b", "1024", "-O", "orphan_file"],
];

fn sync(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
    tool("sync", &["-f", path.to_str().unwrap()]);
}

/// Does on the mounted image what leaves traces of every kind in a journal.
fn work(root: &Path) {
    for round in 0..6 {
        let dir = root.join(format!("dir-{round}"));
        std::fs::create_dir(&dir).unwrap();
        for at in 0..60 {
            let mut file = File::create(dir.join(format!("file-{at}"))).unwrap();
            file.write_all(&noise(at * 97, at as u64)).unwrap();
        }
        sync(&dir);
        // Blocks of a directory become file data, which the journal must not overwrite: revoke records.
        if round % 2 == 1 {
            std::fs::remove_dir_all(root.join(format!("dir-{}", round - 1))).unwrap();
            let mut file = File::create(root.join(format!("big-{round}"))).unwrap();
            // Content that looks like a journal block.
            file.write_all(&0xc03b_3998_u32.to_be_bytes().repeat(40_000)).unwrap();
            sync(root);
        }
    }
}

/// Copies the image while it is mounted, with files open that have no name any more and one being shortened.
pub(crate) fn crashed(shape: &[&str]) -> Image {
    let image = Image::make("48M", shape, None);
    image.mounted(|root| {
        work(root);
        let unnamed: Vec<File> = (0..5)
            .map(|at| {
                let path = root.join(format!("unnamed-{at}"));
                let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
                file.write_all_at(&noise(50_000, at), 0).unwrap();
                file.sync_all().unwrap();
                std::fs::remove_file(&path).unwrap();
                file
            })
            .collect();
        File::create(root.join("last")).unwrap().write_all(b"the last file").unwrap();
        sync(root);
        let copy = image.copy();
        drop(unnamed);
        copy
    })
}
