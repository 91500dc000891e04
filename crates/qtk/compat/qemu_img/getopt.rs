//! Command lines as GNU getopt_long reads them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::message::Failure;

/// The options of a command line, one after the other.
///
/// Options are described in a string of words, one an option: its spellings, separated by `|`, and a colon if it has an
/// argument, as in `h|help f|format: image-opts`. The first spelling names the option in what is found.
#[derive(Debug)]
pub(crate) struct Options {
    known: &'static str,
    /// Whether options may follow operands. If not, the first operand is the end.
    permute: bool,
    arguments: Vec<OsString>,
    /// The argument to look at next.
    index: usize,
    /// How much of it has been read, where several short options share it.
    cluster: usize,
    /// The operands that were passed over: they are moved behind the options that follow them.
    operands: std::ops::Range<usize>,
}

/// An option that was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its first spelling.
    pub(crate) name: &'static str,
    /// Its argument; empty if it takes none.
    pub(crate) value: OsString,
}

impl Found {
    /// The argument as text.
    pub(crate) fn text(self) -> Result<String, Failure> {
        self.value.into_string().map_err(|value| {
            Failure::new(format!("The argument '{}' of option '{}' is not valid UTF-8", value.display(), self.name))
        })
    }
}

#[derive(Clone, Copy)]
struct Known {
    name: &'static str,
    spellings: &'static str,
    has_argument: bool,
}

impl Options {
    /// `arguments` begin with the name of the program or command.
    pub(crate) fn new(arguments: Vec<OsString>, known: &'static str) -> Self {
        Self { known, permute: true, arguments, index: 1, cluster: 0, operands: 1..1 }
    }

    /// As [`new`](Self::new), but only options in front of the first operand count.
    pub(crate) fn in_front(arguments: Vec<OsString>, known: &'static str) -> Self {
        Self { permute: false, ..Self::new(arguments, known) }
    }

    /// The next option.
    pub(crate) fn next(&mut self) -> Result<Option<Found>, Failure> {
        if self.cluster > 0 {
            return self.short().map(Some);
        }
        self.pass_operands();
        let Some(argument) = self.arguments.get(self.index).map(|argument| argument.as_bytes()) else {
            return Ok(None);
        };
        if !is_option(argument) {
            return Ok(None);
        }
        if argument == b"--" {
            self.index += 1;
            self.gather();
            self.operands.end = self.arguments.len();
            self.index = self.operands.end;
            return Ok(None);
        }
        if argument.starts_with(b"--") {
            return self.long().map(Some);
        }
        self.cluster = 1;
        self.short().map(Some)
    }

    /// What is no option, when there is no [`next`](Self::next) any more.
    pub(crate) fn operands(mut self) -> Vec<OsString> {
        let start = if self.operands.is_empty() { self.index } else { self.operands.start };
        self.arguments.split_off(start.min(self.arguments.len()))
    }

    fn pass_operands(&mut self) {
        self.gather();
        if !self.permute {
            return;
        }
        while self.arguments.get(self.index).is_some_and(|argument| !is_option(argument.as_bytes())) {
            self.index += 1;
        }
        self.operands.end = self.index;
    }

    /// Moves the operands that were passed over behind the options that were read since.
    fn gather(&mut self) {
        let passed = self.operands.len();
        let read = self.index - self.operands.end;
        self.arguments[self.operands.start..self.index].rotate_left(passed);
        self.operands = self.operands.start + read..self.index;
    }

    fn known(&self) -> impl Iterator<Item = Known> + use<> {
        self.known.split(' ').map(|word| {
            let spellings = word.trim_end_matches(':');
            let name = spellings.split_once('|').map_or(spellings, |(first, _)| first);
            Known { name, spellings, has_argument: spellings.len() < word.len() }
        })
    }

    fn short(&mut self) -> Result<Found, Failure> {
        let cluster = self.arguments[self.index].as_bytes();
        let letter = cluster[self.cluster];
        let rest = &cluster[self.cluster + 1..];
        let found =
            self.known().find(|known| known.spellings.split('|').any(|spelling| spelling.as_bytes() == [letter]));
        let has_argument = found.is_some_and(|known| known.has_argument);
        let attached = (has_argument && !rest.is_empty()).then(|| OsString::from_vec(rest.to_vec()));
        if rest.is_empty() || has_argument {
            self.index += 1;
            self.cluster = 0;
        } else {
            self.cluster += 1;
        }
        self.finish(found, attached)
    }

    fn long(&mut self) -> Result<Found, Failure> {
        let word = &self.arguments[self.index].as_bytes()[2..];
        let (spelling, attached) = match word.iter().position(|&byte| byte == b'=') {
            Some(equals) => (&word[..equals], Some(OsStr::from_bytes(&word[equals + 1..]).to_owned())),
            None => (word, None),
        };
        let found = self.long_named(spelling).filter(|known| known.has_argument || attached.is_none());
        self.index += 1;
        self.finish(found, attached)
    }

    /// The option of that spelling, or else the only one whose spelling begins so.
    fn long_named(&self, spelling: &[u8]) -> Option<Known> {
        let long = |known: &Known| known.spellings.split('|').filter(|spelling| spelling.len() > 1);
        if let Some(exact) = self.known().find(|known| long(known).any(|long| long.as_bytes() == spelling)) {
            return Some(exact);
        }
        let mut begins = self.known().filter(|known| long(known).any(|long| long.as_bytes().starts_with(spelling)));
        let first = begins.next()?;
        begins.next().is_none().then_some(first)
    }

    fn finish(&mut self, found: Option<Known>, attached: Option<OsString>) -> Result<Found, Failure> {
        let Some(known) = found else {
            return Err(Failure::usage(format!("unrecognized option '{}'", self.last())));
        };
        let value = match attached {
            Some(value) => value,
            None if !known.has_argument => OsString::new(),
            None => {
                let value = self.arguments.get(self.index).cloned();
                let value =
                    value.ok_or_else(|| Failure::usage(format!("missing argument for option '{}'", self.last())));
                self.index += 1;
                value?
            }
        };
        Ok(Found { name: known.name, value })
    }

    /// The argument before the next: within a cluster of short options it is not the cluster, and QEMU's messages name it
    /// all the same.
    fn last(&self) -> std::ffi::os_str::Display<'_> {
        self.arguments[self.index - 1].display()
    }
}

fn is_option(argument: &[u8]) -> bool {
    argument.len() > 1 && argument[0] == b'-'
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = "h|help f|format: q o: object: output: image-opts";

    /// The options found, and the operands or what was wrong.
    type Parsed = (Vec<(&'static str, String)>, Result<Vec<String>, String>);

    fn parse(line: &str) -> Parsed {
        let mut options = Options::new(line.split(' ').map(OsString::from).collect(), KNOWN);
        let mut found = Vec::new();
        loop {
            match options.next() {
                Ok(Some(option)) => found.push((option.name, option.text().unwrap())),
                Ok(None) => break,
                Err(failure) => return (found, Err(failure.to_string())),
            }
        }
        (found, Ok(options.operands().into_iter().map(|operand| operand.into_string().unwrap()).collect()))
    }

    fn flags(line: &str) -> Vec<(&'static str, String)> {
        parse(line).0
    }

    fn operands(line: &str) -> Vec<String> {
        parse(line).1.unwrap()
    }

    #[test]
    fn reads_every_spelling() {
        let raw = vec![("f", "raw".to_owned())];
        for line in
            ["x -f raw a", "x a -f raw", "x -fraw", "x --format raw", "x --format=raw", "x --fo=raw", "x a --f raw"]
        {
            assert_eq!(flags(line), raw, "{line}");
        }
        assert_eq!(flags("x -qhfraw"), [("q", String::new()), ("h", String::new()), ("f", "raw".to_owned())]);
        assert_eq!(flags("x -f -q"), [("f", "-q".to_owned())]);
    }

    #[test]
    fn operands_keep_their_order() {
        assert_eq!(operands("x a -q b -f c d"), ["a", "b", "d"]);
        assert_eq!(operands("x a -q -- b -f"), ["a", "b", "-f"]);
        assert_eq!(operands("x -q -- -f"), ["-f"]);
        assert_eq!(operands("x - -q"), ["-"]);
        assert_eq!(operands("x"), Vec::<String>::new());
    }

    #[test]
    fn stops_at_the_first_operand_if_told_to() {
        let mut options = Options::in_front(["x", "-q", "a", "-q"].map(OsString::from).to_vec(), KNOWN);
        assert_eq!(options.next().unwrap().unwrap().name, "q");
        assert_eq!(options.next().unwrap(), None);
        assert_eq!(options.operands(), ["a", "-q"]);
    }

    #[test]
    fn names_what_qemu_names() {
        for (line, message) in [
            ("x --foo", "unrecognized option '--foo'"),
            ("x --help=3", "unrecognized option '--help=3'"),
            ("x --o 3", "unrecognized option '--o'"),
            ("x -z", "unrecognized option '-z'"),
            ("x -zq", "unrecognized option 'x'"),
            ("x a -zq", "unrecognized option 'a'"),
            ("x a -q -zq", "unrecognized option 'a'"),
            ("x -q -zq", "unrecognized option '-q'"),
            ("x -f", "missing argument for option '-f'"),
            ("x -qf", "missing argument for option '-qf'"),
            ("x --output", "missing argument for option '--output'"),
        ] {
            assert_eq!(parse(line).1, Err(message.to_owned()), "{line}");
        }
    }
}
