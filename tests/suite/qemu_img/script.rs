//! The files of cases: plain text, read and written back.
//!
//! ```text
//! # A comment.
//! [a scene: what its cases start from]
//! > qemu-img create -q -f qcow2 disk.qcow2 1M
//! $ check disk.qcow2
//! $~ snapshot -c one disk.qcow2
//! + snapshot -d one disk.qcow2
//! > qemu-io -c 'write 0 64k' disk.qcow2
//! $ info nothing.qcow2
//!   2| qemu-img: Could not open 'nothing.qcow2': ...
//!   =| 1
//! ```
//!
//! - `>`: a shell command, run by the real tools. Before a scene's first case it sets the scene.
//! - `$`: a case: `qemu-img` and the rest of the line, in a shell, in a fresh copy of the scene. `+`: the same case goes on.
//! - `$~`: clusters of the resulting images may lie elsewhere than `qemu-img` puts them.
//! - `$!`: known to differ; an error as soon as it does not.
//! - `1|`, `2|`, `=|`: what upstream's tool prints and its exit code, recorded where the path's tool answers otherwise.

use std::fmt::Write;

/// A file of cases.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub(crate) scenes: Vec<Scene>,
}

#[derive(Debug, Default)]
pub(crate) struct Scene {
    pub(crate) title: String,
    pub(crate) comments: Vec<String>,
    pub(crate) setup: Vec<String>,
    pub(crate) cases: Vec<Case>,
}

#[derive(Debug, Default)]
pub(crate) struct Case {
    pub(crate) comments: Vec<String>,
    /// Clusters may lie elsewhere.
    pub(crate) elsewhere: bool,
    pub(crate) known_to_differ: bool,
    pub(crate) steps: Vec<Step>,
}

/// A line of a case.
#[derive(Debug)]
pub(crate) enum Step {
    /// A command for the tool under test, and upstream's answer where it was recorded.
    Tool { arguments: String, recorded: Option<Answer> },
    /// A shell command, the same for both sides.
    Shell(String),
}

/// What a command printed and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: i32,
}

impl Case {
    /// What was asked of the tool, for messages.
    pub(crate) fn title(&self) -> String {
        let lines = self.steps.iter().map(|step| match step {
            Step::Tool { arguments, .. } => format!("qemu-img {arguments}"),
            Step::Shell(line) => line.clone(),
        });
        lines.collect::<Vec<_>>().join("; ")
    }
}

impl Script {
    /// Reads a file of cases; panics with the line that is no part of one.
    pub(crate) fn parse(text: &str) -> Self {
        let mut script = Self::default();
        let mut comments = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let unexpected = || -> ! { panic!("line {}: unexpected here: {line}", number + 1) };
            let (mark, rest) = line.trim_start().split_once(' ').unwrap_or((line.trim_start(), ""));
            if line.trim().is_empty() {
                continue;
            } else if mark.starts_with('#') {
                comments.push(line.to_owned());
                continue;
            } else if let Some(title) = line.strip_prefix('[') {
                let title = title.trim_end_matches(']').to_owned();
                script.scenes.push(Scene { title, comments: std::mem::take(&mut comments), ..Scene::default() });
                continue;
            }
            let Some(scene) = script.scenes.last_mut() else { unexpected() };
            match (mark, scene.cases.last_mut()) {
                ("$" | "$~" | "$!" | "$~!", _) => scene.cases.push(Case {
                    comments: std::mem::take(&mut comments),
                    elsewhere: mark.contains('~'),
                    known_to_differ: mark.contains('!'),
                    steps: vec![Step::Tool { arguments: rest.to_owned(), recorded: None }],
                }),
                (">", None) => scene.setup.push(rest.to_owned()),
                (">", Some(case)) => case.steps.push(Step::Shell(rest.to_owned())),
                ("+", Some(case)) => {
                    case.steps.push(Step::Tool { arguments: rest.to_owned(), recorded: None });
                }
                ("1|" | "2|" | "=|", Some(case)) => match case.steps.last_mut() {
                    Some(Step::Tool { recorded, .. }) => recorded.get_or_insert_default().add(mark, rest),
                    _ => unexpected(),
                },
                _ => unexpected(),
            }
        }
        script
    }

    /// The text that [`parse`](Self::parse) reads.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        let mut line = |line: &str| writeln!(text, "{line}").expect("memory takes it");
        for (index, scene) in self.scenes.iter().enumerate() {
            if index > 0 {
                line("");
            }
            scene.comments.iter().for_each(|comment| line(comment));
            line(&format!("[{}]", scene.title));
            scene.setup.iter().for_each(|command| line(&format!("> {command}")));
            for case in &scene.cases {
                case.comments.iter().for_each(|comment| line(comment));
                let elsewhere = if case.elsewhere { "~" } else { "" };
                let known = if case.known_to_differ { "!" } else { "" };
                let mut mark = format!("${elsewhere}{known}");
                for step in &case.steps {
                    match step {
                        Step::Shell(command) => line(&format!("> {command}")),
                        Step::Tool { arguments, recorded } => {
                            line(format!("{mark} {arguments}").trim_end());
                            recorded.iter().flat_map(Answer::lines).for_each(|answer| line(&answer));
                        }
                    }
                    mark = "+".to_owned();
                }
            }
        }
        text
    }
}

impl Answer {
    fn add(&mut self, mark: &str, text: &str) {
        match mark {
            "1|" => self.stdout.push_str(&unescape(text)),
            "2|" => self.stderr.push_str(&unescape(text)),
            _ => self.code = text.parse().expect("an exit code"),
        }
    }

    fn lines(&self) -> Vec<String> {
        let printed = [("1|", &self.stdout), ("2|", &self.stderr)];
        let lines = printed
            .iter()
            .flat_map(|(mark, text)| text.split_inclusive('\n').map(move |line| format!("  {mark} {}", escape(line))));
        lines.chain([format!("  =| {}", self.code)]).collect()
    }
}

/// A line without its end, where it has one; one without is marked with a backslash at its end.
fn escape(line: &str) -> String {
    let escaped = line.replace('\\', r"\\").replace('\r', r"\r").replace('\t', r"\t");
    match escaped.strip_suffix('\n') {
        Some(whole) => whole.to_owned(),
        None => escaped + r"\",
    }
}

fn unescape(text: &str) -> String {
    let mut line = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('r') => line.push('\r'),
                Some('t') => line.push('\t'),
                Some(other) => line.push(other),
                None => return line,
            },
            other => line.push(other),
        }
    }
    line.push('\n');
    line
}

#[test]
fn scripts_are_read_as_they_are_written() {
    let text = r"# Why.
[scene]
> qemu-img create -q -f raw disk 1M
# Because.
$~! snapshot -l disk
  1| \ttab\r\
  =| 0
> qemu-io disk
+ info
  2| one \\ two
  2|
  2| three
  =| 1

[another]
$ info
";
    let script = Script::parse(text);
    assert_eq!(script.render().replace(" \n", "\n"), text);
    let Step::Tool { recorded: Some(answer), .. } = &script.scenes[0].cases[0].steps[0] else { panic!("recorded") };
    assert_eq!(answer, &Answer { stdout: "\ttab\r".to_owned(), ..Answer::default() });
}
