//! Runs cases on both sides and tells where they part.

use std::fmt::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::images;
use super::mask::{mask, without_places};
use super::script::{Answer, Case, Scene, Script, Step};
use crate::support::{arg, command, ok, root, run};

/// Long enough for the slowest case on a busy machine; a tool that hangs is told from one that works.
const LIMIT: &str = "120";

/// Runs `NAME.txt`.
pub(super) fn file(name: &str) {
    let path = root().join("tests/suite/qemu_img").join(name).with_extension("txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut script = Script::parse(&text);
    let upstream = std::env::var_os("QTK_UPSTREAM").map(PathBuf::from);
    let wanted = std::env::var("QTK_CASES").unwrap_or_default();
    let bench = Bench::new(upstream.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_qtk"))));
    let (mut cases, mut report, mut failed) = (0, String::new(), 0);
    for scene in &mut script.scenes {
        if !scene.cases.iter().any(|case| case.title().contains(&wanted)) {
            continue;
        }
        bench.set(scene);
        for case in scene.cases.iter_mut().filter(|case| case.title().contains(&wanted)) {
            cases += 1;
            let mut problems = bench.run(case, upstream.is_some());
            if case.known_to_differ && upstream.is_none() {
                problems = match problems.is_empty() {
                    true => vec!["no longer differs: take its mark away".to_owned()],
                    false => Vec::new(),
                };
            }
            if !problems.is_empty() {
                failed += 1;
                let told = problems.join("\n");
                write!(report, "\n[{}] {}\n{told}\n", scene.title, case.title()).expect("memory takes it");
            }
        }
    }
    if upstream.is_some() {
        std::fs::write(&path, script.render()).unwrap();
    }
    assert!(failed == 0, "{name}: {failed} of {cases} cases differ\n{report}");
}

/// The folders of a run: `start` holds the scene, `qemu` and `ours` are the two sides' copies of it.
///
/// Their names are of one length, so that what holds a path is laid out alike.
pub(super) struct Bench {
    folder: tempfile::TempDir,
}

#[derive(Clone, Copy)]
enum Side {
    Qemu,
    Ours,
}

impl Bench {
    pub(super) fn new(subject: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bin")).unwrap();
        symlink(subject, folder.path().join("bin/qemu-img")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn side(&self, side: Side) -> PathBuf {
        self.path(match side {
            Side::Qemu => "qemu",
            Side::Ours => "ours",
        })
    }

    pub(super) fn set(&self, scene: &Scene) {
        let start = self.path("start");
        let _ = std::fs::remove_dir_all(&start);
        std::fs::create_dir(&start).unwrap();
        for line in &scene.setup {
            let done = self.shell(line, &start, Side::Qemu);
            assert_eq!(done.code, 0, "[{}] cannot be set: {line}\n{}", scene.title, done.stderr);
        }
    }

    /// What is different; with `record` the subject is upstream's tool, and what it says differently becomes part of the case.
    pub(super) fn run(&self, case: &mut Case, record: bool) -> Vec<String> {
        for side in [Side::Qemu, Side::Ours] {
            let _ = std::fs::remove_dir_all(self.side(side));
            ok(&mut command("cp", &["-a", "--reflink=auto", arg(&self.path("start")), arg(&self.side(side))]));
        }
        let (mut problems, mut effects_differ, mut failed) = (Vec::new(), false, true);
        for step in &mut case.steps {
            let (arguments, recorded) = match step {
                Step::Tool { arguments, recorded } => (arguments, recorded),
                Step::Shell(line) => {
                    let sides = [Side::Qemu, Side::Ours].map(|side| self.shell(line, &self.side(side), Side::Qemu));
                    let codes = sides.map(|answer| Answer { code: answer.code, ..Answer::default() });
                    problems.extend(difference(line, &codes[0], &codes[1]));
                    continue;
                }
            };
            let line = format!("qemu-img {arguments}");
            let [qemu, ours] = [Side::Qemu, Side::Ours].map(|side| self.shell(&line, &self.side(side), side));
            if record {
                *recorded = (qemu != ours).then(|| ours.clone());
            }
            let expected = recorded.as_ref().unwrap_or(&qemu);
            effects_differ |= expected.code != qemu.code;
            failed &= expected.code != 0;
            let elsewhere = case.elsewhere;
            problems.extend(difference(&line, &expected.clone().for_layout(elsewhere), &ours.for_layout(elsewhere)));
        }
        // Where the dialects part in what they do, one's images do not say what the other's should be.
        // What a failing command has changed by then it need not leave behind as QEMU's does.
        let changed_nothing = || images::alike(&self.path("start"), &self.side(Side::Ours));
        if !effects_differ && (!failed || !changed_nothing()) {
            problems.extend(images::differences(&self.folder, case.elsewhere));
        }
        problems
    }

    /// Runs a line of shell, with qtk or the path's own tool as `qemu-img`.
    fn shell(&self, line: &str, folder: &Path, tool: Side) -> Answer {
        let path = std::env::var("PATH").unwrap();
        let path = match tool {
            Side::Qemu => path,
            Side::Ours => format!("{}:{path}", arg(&self.path("bin"))),
        };
        let mut shell = command("timeout", &[LIMIT, "sh", "-c", line]);
        shell.current_dir(folder).env("PATH", path).env("LC_ALL", "C").env("TZ", "UTC");
        let ran = run(&mut shell);
        let clean = |text: &str| mask(text, arg(folder));
        Answer { stdout: clean(&ran.stdout), stderr: clean(&ran.stderr), code: ran.code }
    }
}

impl Answer {
    /// The answer as far as it can be compared, where clusters may lie elsewhere.
    fn for_layout(self, elsewhere: bool) -> Self {
        if elsewhere { Self { stdout: without_places(&self.stdout), ..self } } else { self }
    }
}

fn difference(line: &str, qemu: &Answer, ours: &Answer) -> Option<String> {
    let mut told = String::new();
    for (stream, qemu, ours) in [("stdout", &qemu.stdout, &ours.stdout), ("stderr", &qemu.stderr, &ours.stderr)] {
        if qemu != ours {
            write!(told, "  {stream} should be:\n{}  but is:\n{}", indent(qemu), indent(ours))
                .expect("memory takes it");
        }
    }
    if qemu.code != ours.code {
        writeln!(told, "  exit code should be {} but is {}", qemu.code, ours.code).expect("memory takes it");
    }
    (!told.is_empty()).then(|| format!("  {line}\n{told}"))
}

/// The text with control characters visible.
fn indent(text: &str) -> String {
    let visible = |line: &str| format!("    {}\n", line.replace('\r', "\\r").trim_end_matches('\n'));
    text.split_inclusive('\n').map(visible).collect()
}
