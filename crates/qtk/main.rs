//! The `qtk` command: parses its arguments, calls a library, prints.

mod cli;
mod compat;
mod failure;
mod progress;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command_line: Vec<_> = std::env::args_os().collect();
    if let Some(tool) = command_line.first().and_then(|program| compat::Tool::called(program)) {
        return tool.run(command_line);
    }
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
