//! Whether two folders hold the same images, as the path's `qemu-img` sees them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::mask::mask;
use crate::support::{Ran, arg, command, run};

/// Files up to this size are compared byte by byte; those above are mostly holes.
const SMALL: u64 = 64 << 20;

/// What is different between the files in `qemu` and `ours`. With `elsewhere`, clusters may lie in other places.
pub(super) fn differences(folder: &tempfile::TempDir, elsewhere: bool) -> Vec<String> {
    let sides = ["qemu", "ours"].map(|side| folder.path().join(side));
    let [qemu, ours] = sides.each_ref().map(|side| files(side));
    let lonely = qemu.symmetric_difference(&ours).map(|name| {
        let side = if qemu.contains(name) { "qemu" } else { "ours" };
        format!("  {} exists only in {side}", name.display())
    });
    let judged = qemu.intersection(&ours).flat_map(|name| Pair { sides: &sides, name, elsewhere }.differences());
    lonely.chain(judged).collect()
}

/// Whether two folders hold the same files, byte by byte.
pub(super) fn alike(one: &Path, other: &Path) -> bool {
    let names = files(one);
    let alike = |name: &PathBuf| {
        let (one, other) = (one.join(name), other.join(name));
        untouched(&one, &other) || small_and_equal(&one, &other)
    };
    names == files(other) && names.iter().all(alike)
}

/// The regular files in a folder and below.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let (mut found, mut folders) = (BTreeSet::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.insert(entry.path().strip_prefix(folder).unwrap().to_owned());
            }
        }
    }
    found
}

/// A file that both sides have.
struct Pair<'a> {
    sides: &'a [PathBuf; 2],
    name: &'a Path,
    elsewhere: bool,
}

impl Pair<'_> {
    fn paths(&self) -> [PathBuf; 2] {
        self.sides.each_ref().map(|side| side.join(self.name))
    }

    fn differences(&self) -> Vec<String> {
        let [qemu, ours] = self.paths();
        if untouched(&qemu, &ours) || small_and_equal(&qemu, &ours) {
            return Vec::new();
        }
        let told = match (is_qcow2(&qemu), is_qcow2(&ours)) {
            (true, true) => self.qcow2(),
            (false, false) => self.raw(),
            _ => vec!["only one is a qcow2 image".to_owned()],
        };
        told.into_iter().map(|difference| format!("  {}: {difference}", self.name.display())).collect()
    }

    fn raw(&self) -> Vec<String> {
        let [qemu, ours] = self.paths().map(|path| path.metadata().unwrap().len());
        if qemu != ours {
            return vec![format!("length should be {qemu} but is {ours}")];
        }
        let compared = self.compare("raw");
        if compared.code == 0 { Vec::new() } else { vec![compared.stdout + &compared.stderr] }
    }

    fn qcow2(&self) -> Vec<String> {
        let mut told = Vec::new();
        for verb in ["info", "check", "map"] {
            let [qemu, ours] = self.sides.each_ref().map(|side| self.ask(verb, side));
            if qemu != ours {
                let codes = format!("exit codes {} and {}", qemu.0, ours.0);
                told.push(format!("{verb} differs, {codes}:\n{}", changes(&qemu.1, &ours.1)));
            }
        }
        let compared = self.compare("qcow2");
        // What the judge cannot read on its own side it cannot compare either.
        if compared.code != 0 && (compared.code == 1 || self.ask("map", &self.sides[0]).0 == 0) {
            told.push(compared.stdout + &compared.stderr);
        }
        told.extend(self.hidden_content());
        told
    }

    fn compare(&self, format: &str) -> Ran {
        let [qemu, ours] = self.paths();
        run(&mut command("qemu-img", &["compare", "-f", format, "-F", format, arg(&qemu), arg(&ours)]))
    }

    /// The judge's answer about one side's image: its exit code, and what it printed without what may differ.
    fn ask(&self, verb: &str, side: &Path) -> (i32, String) {
        let name = arg(self.name);
        let ran = run(command("qemu-img", &[verb, "--output=json", "-f", "qcow2", name]).current_dir(side));
        let text = mask(&ran.stdout, arg(side));
        let text = match serde_json::from_str::<Value>(&text.replace("...", "0")) {
            Ok(value) if self.elsewhere => format!("{:#}", without_places(value)),
            _ => text,
        };
        (ran.code, text)
    }

    /// Snapshots and bitmaps whose content differs.
    fn hidden_content(&self) -> Vec<String> {
        let info = self.ask("info", &self.sides[0]).1.replace("...", "0");
        let info: Value = serde_json::from_str(&info).unwrap_or_default();
        let texts = |list: &Value, key: &str| -> Vec<String> {
            let items = list.as_array().into_iter().flatten();
            items.filter_map(|item| item[key].as_str().map(str::to_owned)).collect()
        };
        let snapshots = texts(&info["snapshots"], "id");
        let bitmaps = texts(&info["format-specific"]["data"]["bitmaps"], "name");
        let snapshots = snapshots.iter().filter_map(|id| self.snapshot(id));
        snapshots.chain(bitmaps.iter().enumerate().filter_map(|(index, name)| self.bitmap(index, name))).collect()
    }

    /// What is marked in a bitmap, as the judge's NBD server shows it.
    fn bitmap(&self, index: usize, name: &str) -> Option<String> {
        let [qemu, ours] = self.sides.each_ref().map(|side| {
            // A server takes its socket away some time after its client has gone: each has its own.
            let (image, socket) = (side.join(self.name), side.join(format!("nbd-socket-{index}")));
            let serve = ["10", "qemu-nbd", "-r", "--fork", "-f", "qcow2", "-k", arg(&socket), "-B", name, arg(&image)];
            let served = run(&mut command("timeout", &serve));
            let node = format!(
                "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
                arg(&socket)
            );
            let map = run(&mut command("qemu-img", &["map", "--output=json", "--image-opts", &node]));
            (served.code, map.code, map.stdout)
        });
        (qemu != ours).then(|| format!("bitmap {name} should mark\n{}\n    but marks\n{}", qemu.2, ours.2))
    }

    fn snapshot(&self, id: &str) -> Option<String> {
        let flat = self.sides.each_ref().map(|side| {
            let flat = side.join("flat-snapshot.raw");
            let (id, image) = (format!("snapshot.id={id}"), side.join(self.name));
            let convert = ["convert", "-f", "qcow2", "-O", "raw", "-l", &id, arg(&image), arg(&flat)];
            (run(&mut command("qemu-img", &convert)).code, flat)
        });
        let [(qemu, flat_qemu), (ours, flat_ours)] = &flat;
        let paths = ["compare", "-f", "raw", "-F", "raw", arg(flat_qemu), arg(flat_ours)];
        let same = qemu == ours && (*qemu != 0 || run(&mut command("qemu-img", &paths)).code == 0);
        for (_, path) in &flat {
            let _ = fs::remove_file(path);
        }
        (!same).then(|| format!("snapshot {id} differs"))
    }
}

/// The lines from the first to the last that differ, those of `qemu` with a minus and those of `ours` with a plus.
fn changes(qemu: &str, ours: &str) -> String {
    let [qemu, ours]: [Vec<&str>; 2] = [qemu, ours].map(|text| text.lines().collect());
    let same = |pairs: &mut dyn Iterator<Item = (&&str, &&str)>| pairs.take_while(|(one, other)| one == other).count();
    let head = same(&mut qemu.iter().zip(&ours));
    let tail = same(&mut qemu[head..].iter().rev().zip(ours[head..].iter().rev()));
    let lines = |sign, text: &[&str]| -> String {
        text[head..text.len() - tail].iter().map(|line| format!("    {sign} {line}\n")).collect()
    };
    lines('-', &qemu) + &lines('+', &ours)
}

/// Neither side wrote to its copy.
fn untouched(qemu: &Path, ours: &Path) -> bool {
    let [qemu, ours] = [qemu, ours].map(|path| path.metadata().unwrap());
    let start = |data: &fs::Metadata| (data.len(), data.modified().unwrap());
    start(&qemu) == start(&ours)
}

fn small_and_equal(qemu: &Path, ours: &Path) -> bool {
    let [qemu, ours] = [qemu, ours].map(|path| File::open(path).unwrap());
    let lengths = [&qemu, &ours].map(|file| file.metadata().unwrap().len());
    if lengths[0] != lengths[1] || lengths[0] > SMALL {
        return false;
    }
    let [qemu, ours] = [qemu, ours].map(|mut file| {
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        content
    });
    qemu == ours
}

fn is_qcow2(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).unwrap().read_exact_at(&mut magic, 0).is_ok() && &magic == b"QFI\xfb"
}

/// Drops what depends on where clusters lie, and joins runs of a map that differed only in it.
fn without_places(mut value: Value) -> Value {
    for place in ["image-end-offset", "fragmented-clusters", "children"] {
        if let Value::Object(fields) = &mut value {
            fields.shift_remove(place);
        }
    }
    let Value::Array(runs) = value else { return value };
    let mut joined: Vec<Value> = Vec::new();
    for mut next in runs {
        next["offset"] = Value::Null;
        // A zero in this layer, whether it says so or has nothing to lie on.
        if next["zero"] == true && next["data"] == false && next["depth"] == 0 {
            next["present"] = Value::Null;
        }
        match joined.last_mut() {
            Some(last) if same_kind(last, &next) => {
                let length = last["length"].as_u64().unwrap() + next["length"].as_u64().unwrap();
                last["length"] = length.into();
            }
            _ => joined.push(next),
        }
    }
    joined.into()
}

fn same_kind(one: &Value, other: &Value) -> bool {
    ["depth", "present", "zero", "data", "compressed"].iter().all(|key| one[key] == other[key])
}
