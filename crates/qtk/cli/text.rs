//! What goes to standard output and error.

use std::io::{self, Write};

use anyhow::Context;

/// Prints a JSON value, indented, with a newline.
pub(crate) fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    out.write_all(b"\n").context("standard output")
}

/// A guest name for JSON. Bytes that are not UTF-8 become U+FFFD.
pub(crate) fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Says on standard error what the user should know though the command goes on.
pub(crate) fn warn(message: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(io::stderr(), "qtk: warning: {message}");
}
