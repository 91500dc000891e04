//! Locks against processes of QEMU that hold an image.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::Folder;
use qtk_block::{BlockWrite, NoProgress};
use qtk_image::{Error, FlattenOptions, Image, NewImage, OpenOptions, create_image, flatten};

/// A process that holds an image until it is dropped.
struct Holder(Child);

impl Holder {
    /// Starts a program and waits until `ready`.
    fn start(folder: &Folder, program: &str, arguments: &[&str], ready: impl Fn() -> bool) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(folder.path()).stdin(Stdio::piped()).stdout(Stdio::null());
        let child =
            command.spawn().unwrap_or_else(|error| panic!("{program} must be installed to run these tests: {error}"));
        let holder = Self(child);
        wait_until(&format!("{program} {arguments:?} holds its image"), ready);
        holder
    }
}

fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ready() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn images() -> Folder {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "4M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    folder
}

fn busy(path: &Path, options: &OpenOptions) -> bool {
    match Image::open(path, options) {
        Ok(_) => false,
        Err(Error::Busy { .. }) => true,
        Err(Error::Backing { source, .. }) if matches!(*source, Error::Busy { .. }) => true,
        Err(error) => panic!("{error}"),
    }
}

fn share() -> OpenOptions {
    OpenOptions { share: true, ..OpenOptions::default() }
}

#[test]
fn an_image_that_qemu_writes_is_busy() {
    let folder = images();
    let top = folder.file("top.qcow2");
    let export = [
        "--blockdev",
        "driver=qcow2,node-name=disk,file.driver=file,file.filename=top.qcow2",
        "--nbd-server",
        "addr.type=unix,addr.path=daemon.sock",
        "--export",
        "type=nbd,id=export,node-name=disk,writable=on",
    ];
    for (program, arguments) in [
        ("qemu-io", &["top.qcow2"][..]),
        ("qemu-nbd", &["-t", "-k", "nbd.sock", "-f", "qcow2", "top.qcow2"]),
        ("qemu-storage-daemon", &export),
    ] {
        let sockets = ["nbd.sock", "daemon.sock"].map(|name| folder.file(name));
        sockets.iter().for_each(|socket| drop(std::fs::remove_file(socket)));
        let socket = sockets.map(|path| path.to_str().unwrap().to_owned());
        let arguments: Vec<String> = arguments
            .iter()
            .map(|word| word.replace("nbd.sock", &socket[0]).replace("daemon.sock", &socket[1]))
            .collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        // The image is opened before what it lies on.
        let holds = || busy(&folder.file("mid.qcow2"), &OpenOptions::writable());
        let holder = Holder::start(&folder, program, &arguments, || busy(&top, &OpenOptions::default()) && holds());
        assert!(busy(&top, &OpenOptions::writable()), "{program}");
        assert!(!busy(&top, &share()), "{program}");
        // What it lies on must hold still, and may be read.
        assert!(!busy(&folder.file("mid.qcow2"), &OpenOptions::default()), "{program}");
        let error = Image::open(&top, &OpenOptions::default()).unwrap_err().to_string();
        assert!(error.contains("top.qcow2") && error.contains("-U"), "{error}");
        let error = create_image(&top, &NewImage { size: Some(512), ..NewImage::default() }).unwrap_err();
        assert!(matches!(error, Error::Busy { .. }), "{error}");
        drop(holder);
        // The kernel closes the files of a killed process in its own time.
        wait_until(&format!("nobody holds what {program} held"), || !busy(&top, &OpenOptions::writable()));
    }
}

#[test]
fn a_raw_image_that_qemu_writes_can_be_read_and_not_written() {
    let folder = images();
    let base = folder.file("base.raw");
    let writes = || busy(&base, &OpenOptions::writable());
    let _holder = Holder::start(&folder, "qemu-io", &["-f", "raw", "base.raw"], writes);
    assert!(!busy(&base, &OpenOptions::default()));
    folder.qemu_img(&["compare", "-f", "raw", "-F", "raw", "base.raw", "base.raw"]);
    let top = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    let flattened = |image: &Image| flatten(image, &folder.file("out"), &FlattenOptions::default(), &NoProgress);
    let error = flattened(&top).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }) && error.to_string().contains("base.raw"), "{error}");
    assert!(!folder.run("qemu-img", &["convert", "-O", "raw", "top.qcow2", "out"]).status.success());
    drop(top);
    flattened(&Image::open(folder.file("top.qcow2"), &share()).unwrap()).unwrap();
}

#[test]
fn qemu_refuses_what_is_being_written() {
    let folder = images();
    let refused = |arguments: &[&str]| {
        let output = folder.run("qemu-io", &[arguments, &["-c", "write 0 512"]].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("lock"), "{arguments:?}: {text}");
    };
    let transaction = Image::open(folder.file("top.qcow2"), &OpenOptions::writable()).unwrap().begin().unwrap();
    transaction.write_at(&[7; 100_000], 1000).unwrap();
    refused(&["top.qcow2"]);
    refused(&["mid.qcow2"]);
    assert!(!folder.run("qemu-img", &["info", "top.qcow2"]).status.success());
    folder.qemu_img(&["info", "-U", "top.qcow2"]);
    transaction.commit().unwrap();
    drop(transaction);
    folder.qemu_io("top.qcow2", &["read -P 7 1000 100000", "write 0 512"]);

    let transaction = Image::open(folder.file("base.raw"), &OpenOptions::writable()).unwrap().begin().unwrap();
    refused(&["-f", "raw", "base.raw"]);
    drop(transaction);
    let _reader = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    refused(&["top.qcow2"]);
    folder.qemu_img(&["info", "top.qcow2"]);
}
