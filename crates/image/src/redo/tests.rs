use super::*;
use crate::{Image, OpenOptions};
use qtk_block::ImageLock;

const SIZE: usize = (3 << 20) + 1000;
const LEN: usize = SIZE.next_multiple_of(SECTOR_LEN);

/// A folder with a raw image whose every sector differs, and what a transaction makes of it.
struct Scene {
    _folder: tempfile::TempDir,
    path: PathBuf,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        let mut old: Vec<u8> = (1..=251).flat_map(|byte| [byte; 300]).cycle().take(SIZE).collect();
        std::fs::write(&path, &old).unwrap();
        old.resize(LEN, 0);
        let mut new = old.clone();
        new[5000..150_000].fill(0xaa);
        new[1 << 20..2 << 20].fill(0);
        let end = new.len();
        new[end - 600..].fill(0xbb);
        Self { _folder: folder, path, old, new }
    }

    fn open(&self) -> Image {
        Image::open(&self.path, &OpenOptions { format: Some(crate::Format::Raw), ..OpenOptions::writable() }).unwrap()
    }

    fn begin(&self) -> RedoLog {
        let image = self.open();
        let log = RedoLog::begin(&image.layers()[0]).unwrap();
        log.overlay().write_at(&self.new[5000..150_000], 5000).unwrap();
        log.overlay().zero(1 << 20..2 << 20).unwrap();
        log.overlay().write_at(&self.new[LEN - 600..], LEN as u64 - 600).unwrap();
        log
    }

    /// Leaves a complete log that nobody has begun to copy.
    fn record(&self) -> Vec<u8> {
        let log = self.begin();
        log.record().unwrap();
        drop(log);
        std::fs::read(log_path(&self.path)).unwrap()
    }

    fn seen_by_reader(&self) -> Result<Vec<u8>, Error> {
        let image = Image::open(&self.path, &OpenOptions::default())?;
        let mut content = vec![0; LEN];
        image.read_at(&mut content, 0).unwrap();
        Ok(content)
    }

    fn state(&self, content: &[u8]) -> &'static str {
        match content {
            content if content == self.old => "old",
            content if content == self.new => "new",
            _ => "neither",
        }
    }

    /// What readers and writers find, after the writer has finished or dropped what was left.
    fn states(&self) -> [&'static str; 2] {
        let read = self.state(&self.seen_by_reader().unwrap());
        drop(self.open());
        assert!(!log_path(&self.path).exists());
        let mut content = std::fs::read(&self.path).unwrap();
        content.resize(LEN, 0);
        [read, self.state(&content)]
    }
}

#[test]
fn a_commit_changes_the_file_and_leaves_no_log() {
    let scene = Scene::new();
    scene.begin().commit().unwrap();
    assert!(!log_path(&scene.path).exists());
    assert_eq!(scene.states(), ["new", "new"]);
}

#[test]
fn a_dropped_transaction_leaves_nothing() {
    let scene = Scene::new();
    drop(scene.begin());
    assert!(!log_path(&scene.path).exists());
    assert_eq!(scene.states(), ["old", "old"]);
}

#[test]
fn a_log_cut_short_anywhere_is_dropped() {
    let scene = Scene::new();
    let log = scene.record();
    let ends = (0..log.len()).step_by(4099).chain(log.len() - 80..log.len());
    for end in ends {
        std::fs::write(log_path(&scene.path), &log[..end]).unwrap();
        assert_eq!(scene.states(), ["old", "old"], "cut at {end} of {}", log.len());
    }
    for torn in (log.len() - 3000..log.len()).step_by(97) {
        let mut torn_log = log.clone();
        torn_log[torn] ^= 1;
        std::fs::write(log_path(&scene.path), &torn_log).unwrap();
        assert_eq!(scene.states(), ["old", "old"], "torn at {torn} of {}", log.len());
    }
}

#[test]
fn a_copy_cut_short_anywhere_is_finished() {
    let scene = Scene::new();
    let log = scene.record();
    for done in (0..=LEN).step_by(SECTOR_LEN * 61).chain([LEN]) {
        let mixed = [&scene.new[..done], &scene.old[done..]].concat();
        // Sectors need not reach the disk in order.
        let backwards = [&scene.old[..done], &scene.new[done..]].concat();
        for content in [mixed, backwards] {
            std::fs::write(log_path(&scene.path), &log).unwrap();
            std::fs::write(&scene.path, content).unwrap();
            assert_eq!(scene.states(), ["new", "new"], "copied to {done}");
        }
    }
}

#[test]
fn a_foreign_change_is_refused() {
    let scene = Scene::new();
    let log = scene.record();
    for (at, touched) in [(5000, true), (140_000, true), (1 << 20, true), (400_000, false)] {
        let mut content = scene.old.clone();
        content[at] ^= 0xff;
        std::fs::write(&scene.path, &content).unwrap();
        std::fs::write(log_path(&scene.path), &log).unwrap();
        let sector = (at / SECTOR_LEN * SECTOR_LEN) as u64;
        for access in [Access::ReadOnly, Access::ReadWrite] {
            match Image::open(&scene.path, &OpenOptions { access, ..OpenOptions::default() }) {
                Err(Error::ForeignChange { offset, .. }) => assert!(touched && offset == sector, "{at}"),
                Ok(_) => assert!(!touched, "{at}"),
                Err(error) => panic!("{error}"),
            }
        }
        if touched {
            assert_eq!(std::fs::read(&scene.path).unwrap(), content);
            assert_eq!(std::fs::read(log_path(&scene.path)).unwrap(), log);
        }
    }
    std::fs::write(&scene.path, &scene.old[..1 << 20]).unwrap();
    std::fs::write(log_path(&scene.path), &log).unwrap();
    assert!(matches!(scene.seen_by_reader(), Err(Error::ForeignChange { .. })));
}

#[test]
fn a_log_is_found_whatever_link_leads_to_the_image() {
    let scene = Scene::new();
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("link.raw");
    std::os::unix::fs::symlink(&scene.path, &link).unwrap();
    let linked = Scene { _folder: folder, path: link, old: scene.old.clone(), new: scene.new.clone() };
    linked.begin().record().unwrap();
    assert_eq!(std::fs::read_dir(linked.path.parent().unwrap()).unwrap().count(), 1);
    assert_eq!(linked.state(&linked.seen_by_reader().unwrap()), "new");
    assert_eq!(scene.states(), ["new", "new"]);
}

#[test]
fn a_reader_keeps_the_log_that_its_writer_removes() {
    let scene = Scene::new();
    scene.record();
    let reader = Image::open(&scene.path, &OpenOptions::default()).unwrap();
    drop(scene.open());
    assert!(!log_path(&scene.path).exists());
    let mut content = vec![0; LEN];
    reader.read_at(&mut content, 0).unwrap();
    assert_eq!(scene.state(&content), "new");
}

#[test]
fn a_log_is_not_left_to_another_image() {
    let scene = Scene::new();
    let log = scene.record();
    let new = crate::NewImage { format: crate::Format::Raw, size: Some(SIZE as u64), ..crate::NewImage::default() };
    let create = || crate::create_image(&scene.path, &new);
    let error = create().unwrap_err();
    assert!(error.to_string().contains("disk.raw.qtk-txn"), "{error}");
    std::fs::remove_file(&scene.path).unwrap();
    create().unwrap_err();
    std::fs::write(log_path(&scene.path), &log[..log.len() / 2]).unwrap();
    create().unwrap();
    assert!(!log_path(&scene.path).exists());
}

#[test]
fn the_log_is_as_private_as_the_image() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new();
    for mode in [0o600, 0o640] {
        std::fs::set_permissions(&scene.path, std::fs::Permissions::from_mode(mode)).unwrap();
        let _log = scene.begin();
        assert_eq!(log_path(&scene.path).metadata().unwrap().permissions().mode() & 0o777, mode);
    }
}

#[test]
fn an_image_with_too_long_a_name_for_a_log_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n".repeat(255));
    std::fs::write(&path, [1; 512]).unwrap();
    Image::open(&path, &OpenOptions::default()).unwrap();
    let error = Image::open(&path, &OpenOptions::writable()).unwrap().begin().unwrap_err();
    assert!(error.to_string().contains("create the transaction's log"), "{error}");
}

#[test]
fn the_log_is_a_valid_image_of_the_new_state() {
    let scene = Scene::new();
    scene.record();
    let log = log_path(&scene.path);
    let qemu_img = |arguments: &[&str]| {
        let output = std::process::Command::new("qemu-img").args(arguments).arg(&log).output();
        let output = output.expect("qemu-img must be installed");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let check = qemu_img(&["check", "--output=json"]);
    assert!(!check.contains("leaks") && !check.contains("corruptions"), "{check}");
    let expected = scene.path.with_file_name("expected.raw");
    std::fs::write(&expected, &scene.new).unwrap();
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", expected.to_str().unwrap()]);
}

#[test]
fn the_image_is_locked_until_the_transaction_is_gone() {
    let scene = Scene::new();
    let transaction = scene.open().begin().unwrap();
    let other = File::open(&scene.path).unwrap();
    ImageLock::acquire(&other, qtk_block::LockMode::Write).unwrap_err();
    transaction.commit().unwrap();
    ImageLock::acquire(&other, qtk_block::LockMode::Write).unwrap_err();
    drop(transaction);
    ImageLock::acquire(&other, qtk_block::LockMode::Write).unwrap();
}

#[test]
fn a_guest_cannot_turn_a_guessed_raw_image_into_qcow2() {
    let scene = Scene::new();
    let magic = qtk_qcow2::MAGIC.to_be_bytes();
    let guessed = Image::open(&scene.path, &OpenOptions::writable()).unwrap().begin().unwrap();
    guessed.write_at(&magic, 0).unwrap();
    assert!(matches!(guessed.commit(), Err(Error::WouldChangeFormat { .. })));
    drop(guessed);
    assert_eq!(scene.states(), ["old", "old"]);
    let named = scene.open().begin().unwrap();
    named.write_at(&magic, 0).unwrap();
    named.commit().unwrap();
    assert_eq!(std::fs::read(&scene.path).unwrap()[..4], magic);
}
