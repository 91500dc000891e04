//! How `qemu-img` says that something failed.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use super::{NAME, words};

/// Why a command failed, as it is told to the user.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Empty if everything has been said.
    text: String,
    /// More lines, without the program's name.
    hint: String,
    code: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), hint: String::new(), code: 1 }
    }

    /// A command line that makes no sense.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(text).hint(format!("Try '{NAME} --help' for more information"))
    }

    /// Ends with `code`, without a word.
    pub(crate) fn silent(code: u8) -> Self {
        Self { code, ..Self::new("") }
    }

    /// With more to say.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// With words in front.
    pub(crate) fn prefix(mut self, prefix: impl fmt::Display) -> Self {
        self.text = format!("{prefix}{}", self.text);
        self
    }

    /// With another exit code.
    pub(crate) fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Tells the user, and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if !self.text.is_empty() {
            error(&self.text);
        }
        if !self.hint.is_empty() {
            say(&self.hint);
        }
        ExitCode::from(self.code)
    }
}

/// The message without the program's name and without the hint.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A failure to print. Nobody needs to hear of a closed pipe.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::silent(1),
            _ => Self::new(format!("standard output: {}", words::system(&error))),
        }
    }
}

impl From<qtk_image::Error> for Failure {
    fn from(error: qtk_image::Error) -> Self {
        Self::new(words::image(&error))
    }
}

impl From<qtk_image::SpecError> for Failure {
    fn from(error: qtk_image::SpecError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<qtk_qcow2::Error> for Failure {
    fn from(error: qtk_qcow2::Error) -> Self {
        Self::new(words::qcow2(&error))
    }
}

/// Tells of an error after which the command goes on.
pub(crate) fn error(text: &str) {
    say(&format!("{NAME}: {text}"));
}

/// Tells of something that is no error.
pub(crate) fn warn(text: &str) {
    error(&format!("warning: {text}"));
}

/// A line on standard error. With nobody to read it, it is dropped.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
