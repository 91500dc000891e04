//! Edits refuse a damaged file system before they write to it.

use qtk_ext4::{EditOptions, Editor, Error, Ino, NewNode, NodeKind, Timestamp};

use crate::layout::{Layout, Structure};
use crate::support::Image;

/// Damages the first structure of a kind, seals it, and tries to make a file.
fn refusal(kind: &str, damage: impl Fn(&mut [u8])) -> String {
    let image = Image::make("16M", &["-b", "1024"], None);
    let mut bytes = std::fs::read(image.path()).unwrap();
    let layout = Layout::read(&bytes);
    let structure: Structure = layout.structures[kind][0];
    damage(&mut bytes[structure.offset..structure.offset + structure.len]);
    layout.seal(&mut bytes, &structure);
    std::fs::write(image.path(), &bytes).unwrap();
    let error = edit(&image).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(std::fs::read(image.path()).unwrap() == bytes, "{error}: something was written");
    error.to_string()
}

fn edit(image: &Image) -> Result<(), Error> {
    let options = EditOptions::new(Timestamp { seconds: 1_700_000_000, nanos: 0 });
    let mut editor = Editor::open(image.device(), options)?;
    let node = NewNode { kind: NodeKind::File, permissions: 0o644, uid: 0, gid: 0, mtime: None };
    let file = editor.create(Ino::ROOT, b"file", &node)?;
    editor.write_at(file, b"content", 0)?;
    editor.commit()
}

#[test]
fn damage_that_checksums_do_not_show() {
    let bits_of_tables = refusal("BlockBitmap", |bitmap| bitmap[8..12].fill(0));
    assert_eq!(
        bits_of_tables,
        "block group 0: its counters do not fit its bitmaps; repair the file system with e2fsck"
    );
    // One bit moved: the counter still fits.
    let moved = refusal("BlockBitmap", |bitmap| {
        bitmap[1] &= !1;
        let free = bitmap.iter().position(|&byte| byte == 0).unwrap();
        bitmap[free] |= 1;
    });
    assert!(moved.contains("mark parts of the file system itself as free"), "{moved}");
    let reserved = refusal("InodeBitmap", |bitmap| bitmap[0] &= !1);
    assert!(reserved.contains("its counters do not fit its bitmaps"), "{reserved}");
    let table = refusal("Group", |descriptor| descriptor[8..12].fill(0xff));
    assert!(table.contains("lie outside the file system"), "{table}");
    let state = refusal("Superblock", |superblock| superblock[58] |= 2);
    assert!(state.contains("marked as damaged; repair the file system with e2fsck"), "{state}");
}
