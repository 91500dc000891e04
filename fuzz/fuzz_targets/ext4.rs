//! Any bytes as an ext4 file system: walk it, read it, edit it. Nothing may panic, hang or take memory out of proportion.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qtk_block::{BlockWrite, MemoryDisk};
use qtk_ext4::{EditOptions, Editor, Ext4, Ino, NewNode, NodeKind, Timestamp};

/// Visits a bounded number of files.
fn walk(fs: &Ext4) {
    let mut queue = vec![Ino::ROOT];
    let mut buffer = [0; 4096];
    for _ in 0..200 {
        let Some(ino) = queue.pop() else { return };
        let _ = (fs.metadata(ino), fs.xattrs(ino), fs.read_link(ino), fs.data_range(ino, 0));
        let _ = (fs.read_at(ino, &mut buffer, 0), fs.lookup(ino, b"etc"));
        if let Ok(entries) = fs.read_dir(ino) {
            queue.extend(entries.iter().take(64).map(|entry| entry.ino));
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let disk = Arc::new(MemoryDisk::new(8 << 20));
    disk.write_at(&bytes[..bytes.len().min(8 << 20)], 0).expect("memory");
    if let Ok(fs) = Ext4::open(Arc::clone(&disk) as _) {
        walk(&fs);
    }
    let now = Timestamp { seconds: 1_700_000_000, nanos: 0 };
    let Ok(mut editor) = Editor::open(disk, EditOptions::new(now)) else { return };
    let node = |kind| NewNode { kind, permissions: 0o644, uid: 0, gid: 0, mtime: None };
    if let Ok(file) = editor.create(Ino::ROOT, b"fuzz", &node(NodeKind::File)) {
        let _ = editor.write_at(file, &[7; 20_000], 5000);
        let _ = editor.set_xattr(file, b"user.fuzz", &[1; 300]);
        let _ = editor.truncate(file, 9000);
    }
    let _ = editor.create(Ino::ROOT, b"directory", &node(NodeKind::Directory));
    let _ = editor.unlink(Ino::ROOT, b"hello");
    if editor.commit().is_ok() {
        walk(editor.fs());
    }
});
