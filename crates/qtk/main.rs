//! The `qtk` command: parses its arguments, calls a library, prints.

mod cli;
mod failure;
mod progress;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    match cli::run(&arguments.command) {
        Ok(code) => code,
        Err(error) if failure::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if standard error is gone too.
            let _ = writeln!(io::stderr(), "qtk: {}", failure::describe(&error));
            failure::exit_code(&error, cli::failure_code(&arguments.command))
        }
    }
}
