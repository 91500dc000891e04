//! What `qemu-img` says when something fails: every error of a library in QEMU's words.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use super::NAME;

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
            _ => Self::new(format!("standard output: {}", system(&error))),
        }
    }
}

impl From<qtk_image::Error> for Failure {
    fn from(error: qtk_image::Error) -> Self {
        Self::new(image(&error))
    }
}

impl From<qtk_qcow2::Error> for Failure {
    fn from(error: qtk_qcow2::Error) -> Self {
        Self::new(qcow2(&error))
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

/// What the C library says of an error of the system.
pub(crate) fn system(error: &io::Error) -> String {
    if let Some(inner) = error.get_ref() {
        if let Some(inner) = inner.downcast_ref::<qtk_image::Error>() {
            return image(inner);
        }
        if let Some(inner) = inner.downcast_ref::<qtk_qcow2::Error>() {
            return qcow2(inner);
        }
    }
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.trim_end_matches(&format!(" (os error {code})")).to_owned(),
        None => text,
    }
}

fn image(error: &qtk_image::Error) -> String {
    use qtk_image::Error;
    match error {
        Error::Io { path, source, .. } => format!("Could not open '{}': {}", path.display(), system(source)),
        Error::Qcow2(error) => qcow2(error),
        Error::Busy { permission, .. } => {
            format!("Failed to get \"{permission}\" lock\nIs another process using the image?")
        }
        other => other.to_string(),
    }
}

fn qcow2(error: &qtk_qcow2::Error) -> String {
    use qtk_qcow2::{Corruption, Error};
    match error {
        Error::Corrupt { what: Corruption::NotQcow2, .. } => "Image is not in qcow2 format".to_owned(),
        other => other.to_string(),
    }
}
