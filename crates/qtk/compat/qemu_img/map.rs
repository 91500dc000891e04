use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_image::{ChainLayer, Image, MapEntry, map};

use super::getopt::Options;
use super::json::Output;
use super::message::Failure;
use super::open::ImageArguments;
use super::{Outcome, help, operand, size};

const OPTIONS: &str = "h|help f|format: s|start-offset: l|max-length: U|force-share output: object: image-opts";

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let (mut image, mut output, mut start, mut length) = (ImageArguments::default(), None, 0, None);
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "output" => output = Some(found.text()?),
            "s" => start = size::argument(&found.text()?, "start offset")?,
            "l" => length = Some(size::argument(&found.text()?, "max length")?),
            _ => image.take(found)?,
        }
    }
    let name = operand(options, "Expecting one image file name")?;
    let output = Output::from_argument(output.as_deref())?;
    let image = image.open(&name, Access::ReadOnly)?;
    let entries = map(&image, start..length.map_or(u64::MAX, |length| start.saturating_add(length)))?;
    match output {
        Output::Human => print_human(&image, &entries)?,
        Output::Json => print_json(&entries, start)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The runs that hold data, each with its file.
fn print_human(image: &Image, entries: &[MapEntry]) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(out, "{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to")?;
    for entry in entries.iter().filter(|entry| entry.data) {
        let Some(offset) = entry.offset else {
            out.flush()?;
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        };
        if !entry.zero {
            let file = image.layers().get(entry.depth).map(ChainLayer::data_filename).unwrap_or_default();
            writeln!(out, "{}{}{}{file}", hexadecimal(entry.start), hexadecimal(entry.length), hexadecimal(offset))?;
        }
    }
    Ok(out.flush()?)
}

/// A column of 16 characters. As in C, zero has no `0x`.
fn hexadecimal(number: u64) -> String {
    if number == 0 { format!("{:<16}", 0) } else { format!("{number:<#16x}") }
}

/// One run a line. Where nothing is left to map, one empty run.
fn print_json(entries: &[MapEntry], start: u64) -> io::Result<()> {
    const EMPTY: &str =
        "\"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \"compressed\": false";
    let mut out = io::BufWriter::new(io::stdout().lock());
    if entries.is_empty() {
        writeln!(out, "[{{ \"start\": {start}, {EMPTY}}}]")?;
    }
    for (index, entry) in entries.iter().enumerate() {
        let open = if index == 0 { "[" } else { "" };
        let close = if index + 1 == entries.len() { "]" } else { "," };
        writeln!(out, "{open}{}{close}", json_line(entry))?;
    }
    out.flush()
}

fn json_line(entry: &MapEntry) -> String {
    let MapEntry { start, length, depth, present, zero, data, compressed, offset, .. } = entry;
    let offset = offset.map_or_else(String::new, |offset| format!(", \"offset\": {offset}"));
    format!(
        "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}
