//! From an error to the line a user reads and the code a script sees.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use qtk_disk::DisplayPath;

/// The error and everything that led to it, in one line, without control characters that an image may have put in.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Wrappers without words of their own show their source's.
        if line.ends_with(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    DisplayPath(line.as_bytes()).to_string()
}

/// 3 where an image turned out to be damaged, else `otherwise`.
pub(crate) fn exit_code(error: &anyhow::Error, otherwise: u8) -> ExitCode {
    ExitCode::from(if causes(error).any(is_corruption) { 3 } else { otherwise })
}

/// Whether the reader of our output has gone, as `qtk ls | head` makes it.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::BrokenPipe)
}

/// Every error in the chain, those inside an `io::Error` included, which its `source` passes over.
fn causes(error: &anyhow::Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    error.chain().flat_map(|cause| {
        let mut found = vec![cause];
        while let Some(io) = found.last().and_then(|last| last.downcast_ref::<io::Error>()) {
            match io.get_ref() {
                Some(inner) => found.push(inner),
                None => break,
            }
        }
        found
    })
}

fn is_corruption(cause: &(dyn Error + 'static)) -> bool {
    if let Some(error) = cause.downcast_ref::<qtk_qcow2::Error>() {
        matches!(error, qtk_qcow2::Error::Corrupt { .. })
    } else if let Some(error) = cause.downcast_ref::<qtk_image::Error>() {
        error.is_corruption()
    } else if let Some(error) = cause.downcast_ref::<qtk_guest::Error>() {
        error.is_corrupt()
    } else if let Some(error) = cause.downcast_ref::<qtk_disk::Error>() {
        error.is_corrupt()
    } else if let Some(error) = cause.downcast_ref::<qtk_ext4::Error>() {
        matches!(error, qtk_ext4::Error::Corrupt { .. })
    } else {
        false
    }
}
