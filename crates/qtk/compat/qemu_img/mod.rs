//! qtk under the name `qemu-img`: the command line, the output and the exit codes of QEMU's tool.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod create_options;
mod dd;
mod getopt;
mod help;
mod info;
mod json;
mod keyval;
mod map;
mod measure;
mod message;
mod new_qcow2;
mod object;
mod open;
mod progress;
mod rebase;
mod resize;
mod size;
mod snapshot;
mod snapshot_param;
mod target;
mod words;

use std::ffi::OsString;
use std::process::ExitCode;

use getopt::Options;
use message::Failure;

/// The name of the tool.
pub(crate) const NAME: &str = "qemu-img";

/// How a command ends.
type Outcome = Result<ExitCode, Failure>;

/// A command and what does it. It takes its arguments, the command's name first.
type Command = (&'static str, fn(Vec<OsString>) -> Outcome);

/// The commands, in alphabetical order.
const COMMANDS: &[Command] = &[
    ("amend", amend::run),
    ("bench", bench::run),
    ("bitmap", bitmap::run),
    ("check", check::run),
    ("commit", commit::run),
    ("compare", compare::run),
    ("convert", convert::run),
    ("create", create::run),
    ("dd", dd::run),
    ("info", info::run),
    ("map", map::run),
    ("measure", measure::run),
    ("rebase", rebase::run),
    ("resize", resize::run),
    ("snapshot", snapshot::run),
];

/// Does what a command line asks for.
pub(crate) fn run(command_line: Vec<OsString>) -> ExitCode {
    dispatch(command_line).unwrap_or_else(|failure| failure.report())
}

fn dispatch(command_line: Vec<OsString>) -> Outcome {
    let mut options = Options::in_front(command_line, "h|help V|version T|trace:");
    let mut traces = false;
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "V" => return help::print_version(),
            // Nothing here can be traced; the patterns of events that may be asked for match none.
            _ => traces = true,
        }
    }
    let arguments = options.operands();
    let Some(name) = arguments.first() else {
        return if traces { Ok(ExitCode::SUCCESS) } else { Err(Failure::usage("Not enough arguments")) };
    };
    match COMMANDS.iter().find(|(command, _)| name == command) {
        Some((_, command)) => command(arguments),
        None => Err(Failure::usage(format!("Command not found: {}", name.display()))),
    }
}

/// The only operand.
fn operand(options: Options, otherwise: &str) -> Result<OsString, Failure> {
    let [operand] = operands(options, otherwise)?;
    Ok(operand)
}

/// As many operands as there must be.
fn operands<const N: usize>(options: Options, otherwise: &str) -> Result<[OsString; N], Failure> {
    options.operands().try_into().map_err(|_| Failure::usage(otherwise))
}
