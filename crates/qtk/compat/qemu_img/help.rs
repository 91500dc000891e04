//! What `--help` and `--version` print. Scripts look for the version and for the list of formats.

use std::io::{self, Write};
use std::process::ExitCode;

use super::{COMMANDS, NAME, Outcome};

/// The version of QEMU's tool whose behaviour is matched.
const VERSION: &str = "10.0.2";

/// The formats and the ways to reach a file.
const FORMATS: &str = "file host_device qcow2 raw";

pub(crate) fn print_version() -> Outcome {
    writeln!(io::stdout(), "{NAME} version {VERSION} (qtk {})", env!("CARGO_PKG_VERSION"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn print() -> Outcome {
    print_version()?;
    let commands: Vec<&str> = COMMANDS.iter().map(|(name, _)| *name).collect();
    write!(
        io::stdout(),
        "usage: {NAME} [-h | --help] [-V | --version] [-T | --trace PATTERN] COMMAND [OPTIONS] ...\n\
         \n\
         This is qtk under the name of QEMU's disk image utility. It takes the same command lines,\n\
         which QEMU's manual page describes; qtk's own commands are listed by `qtk --help`.\n\
         \n\
         Commands: {}\n\
         \n\
         Supported formats: {FORMATS}\n",
        commands.join(" ")
    )?;
    Ok(ExitCode::SUCCESS)
}
