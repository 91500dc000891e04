//! Names of other files in headers, as an attacker would write them: none is followed further than the caller allows, and none
//! is taken for more than the name of a local file.

use qtk_block::BlockRead;
use qtk_image::{BackingPolicy, Error, Image, OpenOptions};

use crate::common::Folder;

const SECRET: &[u8] = b"what another tenant keeps on this host";

/// An image whose header calls its data file `name`, whatever that is.
fn with_data_file(folder: &Folder, name: &str) {
    let placeholder = "x".repeat(name.len());
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("data_file={placeholder}"), "image.qcow2", "64K"]);
    let path = folder.file("image.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(name.len()).position(|window| window == placeholder.as_bytes()).unwrap();
    bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    std::fs::write(path, bytes).unwrap();
    std::fs::remove_file(folder.file(&placeholder)).unwrap();
}

fn secret(folder: &Folder) -> String {
    let path = folder.file("secret");
    std::fs::write(&path, [SECRET, &[0; 4096]].concat()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn open(folder: &Folder, backing: BackingPolicy) -> Result<Image, Error> {
    Image::open(folder.file("image.qcow2"), &OpenOptions { backing, ..OpenOptions::default() })
}

#[test]
fn a_data_file_is_opened_only_where_that_is_allowed() {
    let folder = Folder::new();
    let name = secret(&folder);
    with_data_file(&folder, &name);
    std::fs::create_dir(folder.file("allowed")).unwrap();
    for policy in [BackingPolicy::Deny, BackingPolicy::Within(folder.file("allowed"))] {
        let error = open(&folder, policy).unwrap_err();
        assert!(matches!(error, Error::DataFileDenied { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("image.qcow2") && text.contains("secret"), "{text}");
    }
    // Metadata is there without it, so that an image can be inspected first.
    let layer = Image::open_layer(
        folder.file("image.qcow2"),
        &OpenOptions { backing: BackingPolicy::Deny, ..OpenOptions::default() },
    );
    let header_says = layer.map(|layer| layer.qcow2().unwrap().header().data_file_name());
    assert!(header_says.is_err() || header_says.is_ok_and(|found| found == Some(name)));
}

/// A data file's name is a path, whatever it looks like.
#[test]
fn a_data_file_is_never_a_description() {
    let folder = Folder::new();
    let name = secret(&folder);
    for name in [
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{name}\"}}}}"),
        "nbd://localhost:10809/disk".to_owned(),
        "fat:rw:/etc".to_owned(),
        "blkdebug::/etc/passwd".to_owned(),
    ] {
        with_data_file(&folder, &name);
        let error = open(&folder, BackingPolicy::Follow).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(name.split(':').next().unwrap()), "{name}: {error}");
    }
}

#[test]
fn a_backing_file_is_opened_only_where_that_is_allowed() {
    let folder = Folder::new();
    let name = secret(&folder);
    folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", "image.qcow2", "4K"]);
    let mut buf = vec![0; SECRET.len()];
    open(&folder, BackingPolicy::Follow).unwrap().read_at(&mut buf, 0).unwrap();
    assert!(buf == SECRET, "the caller may want it");
    std::fs::create_dir(folder.file("allowed")).unwrap();
    std::os::unix::fs::symlink(&name, folder.file("allowed/link")).unwrap();
    let within = || BackingPolicy::Within(folder.file("allowed"));
    for name in [name.as_str(), "allowed/../secret", "allowed/link", "file:secret"] {
        folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "image.qcow2", "4K"]);
        for policy in [BackingPolicy::Deny, within()] {
            let error = open(&folder, policy.clone()).unwrap_err();
            let missing = name.starts_with("file:") && !matches!(policy, BackingPolicy::Deny);
            assert!(missing || matches!(error, Error::BackingDenied { .. }), "{name} {policy:?}: {error}");
        }
    }
}

#[test]
fn a_backing_file_is_never_a_protocol() {
    let folder = Folder::new();
    let name = secret(&folder);
    for name in [
        format!("json:{{\"driver\":\"raw\",\"file.filename\":\"{name}\"}}"),
        format!("blkverify:{name}:{name}"),
        "nbd:unix:/run/socket".to_owned(),
        "ssh://host/disk".to_owned(),
        "fat:/etc".to_owned(),
        "host_device:/dev/sda".to_owned(),
    ] {
        folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", "image.qcow2", "4K"]);
        let error = open(&folder, BackingPolicy::Follow).unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text += &format!(": {error}");
            source = error.source();
        }
        assert!(text.contains("not a local file"), "{name}: {text}");
    }
}
