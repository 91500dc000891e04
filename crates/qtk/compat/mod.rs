//! The names of other tools that qtk answers to, with their command lines, output and exit codes.

mod install;
mod qemu_img;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

pub(crate) use install::Compat;

/// A tool that qtk can be called as.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    /// The name it goes by.
    name: &'static str,
    /// Does its work. Takes the whole command line, the program's name first.
    run: fn(Vec<OsString>) -> ExitCode,
}

const TOOLS: &[Tool] = &[Tool { name: qemu_img::NAME, run: qemu_img::run }];

impl Tool {
    /// The tool that a program of this name, which may be a path, is taken for. None for qtk itself.
    pub(crate) fn called(program: &OsStr) -> Option<Self> {
        let name = Path::new(program).file_name()?;
        TOOLS.iter().copied().find(|tool| name == tool.name)
    }

    /// Does what the command line asks for.
    pub(crate) fn run(self, command_line: Vec<OsString>) -> ExitCode {
        (self.run)(command_line)
    }
}
