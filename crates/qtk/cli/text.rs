//! What goes to standard output and error.

use std::io::{self, Read, Write};

use anyhow::Context;
use qtk_disk::DisplayPath;

/// Prints a JSON value, indented, with a newline.
pub(crate) fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    out.write_all(b"\n").context("standard output")
}

/// Standard input, of which the first 16 MiB are read at once. With an edit that begins only then, a pipeline can change a
/// file in place: `qtk cat IMAGE FILE | sed ... | qtk write IMAGE FILE`.
pub(crate) fn input() -> anyhow::Result<Box<dyn Read>> {
    const AT_ONCE: u64 = 16 << 20;
    let mut head = Vec::new();
    let read = io::stdin().lock().take(AT_ONCE).read_to_end(&mut head).context("cannot read standard input")?;
    let head = io::Cursor::new(head);
    Ok(if (read as u64) < AT_ONCE { Box::new(head) } else { Box::new(head.chain(io::stdin())) })
}

/// Text out of an image, safe on a terminal.
pub(crate) fn shown(text: &str) -> DisplayPath<'_> {
    DisplayPath(text.as_bytes())
}

/// A guest name for JSON. Bytes that are not UTF-8 become U+FFFD.
pub(crate) fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// Says on standard error what the user should know though the command goes on.
pub(crate) fn warn(message: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(io::stderr(), "qtk: warning: {}", shown(message));
}
