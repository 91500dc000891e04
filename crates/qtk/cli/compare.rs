use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_block::BlockRead;
use qtk_image::{Comparison, compare};
use serde_json::json;

use super::arguments::AccessArguments;
use super::{guest, text};
use crate::progress::Bar;

/// Tell whether two images hold the same disk
#[derive(Args, Debug)]
#[command(
    after_help = "Exit code 0 where they do, 1 where they differ, 2 where that cannot be told, 3 where an image is corrupt.\n\
    A longer image is the same if its rest is zero."
)]
pub(crate) struct Compare {
    /// One image
    first: PathBuf,

    /// The other
    second: PathBuf,

    #[command(flatten)]
    access: AccessArguments,

    /// Sizes and holes must be the same too
    #[arg(short, long)]
    strict: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Compare {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let first = guest::open(&self.first, &self.access.for_reading())?;
        let second = guest::open(&self.second, &self.access.for_reading())?;
        let bar = Bar::new(first.size().max(second.size()), "comparing");
        let comparison = compare(&first, &second, self.strict, &bar)?;
        drop(bar);
        let (words, offset) = match comparison {
            Comparison::Identical => ("Images are identical.".to_owned(), None),
            Comparison::Different { offset } => (format!("Content mismatch at offset {offset}!"), Some(offset)),
            Comparison::SizesDiffer => ("Strict mode: Image size mismatch!".to_owned(), None),
            Comparison::AllocationDiffers { offset } => {
                (format!("Strict mode: Offset {offset} block status mismatch!"), Some(offset))
            }
        };
        let identical = comparison == Comparison::Identical;
        if self.json {
            text::print_json(&json!({ "identical": identical, "offset": offset }))?;
        } else {
            writeln!(io::stdout(), "{words}")?;
        }
        Ok(if identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
