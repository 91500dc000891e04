//! How far a command has come: all the time with `-p`, and on `SIGUSR1` without.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use qtk_block::Progress;

use super::Outcome;

/// Percents that must have passed before progress is shown again.
const STEP: f64 = 1.0;

/// What shows the progress of one command.
#[derive(Debug)]
pub(crate) struct Meter {
    /// `-p`: on standard output. If not, on standard error, whenever somebody asks.
    shown: bool,
    /// The percentage that was shown last.
    last: Mutex<f64>,
}

impl Meter {
    /// Shows nothing yet.
    pub(crate) fn new(shown: bool) -> Self {
        // Where the signal cannot be watched it ends the process, as it does anywhere else.
        let _ = qtk_block::watch_progress_requests();
        Self { shown, last: Mutex::new(0.0) }
    }

    /// As [`new`](Self::new), and shows that nothing is done.
    pub(crate) fn begin(shown: bool) -> Self {
        let meter = Self::new(shown);
        meter.set(0.0);
        meter
    }

    /// So much is done, of 100.
    pub(crate) fn set(&self, percent: f64) {
        if !self.shown {
            if qtk_block::take_progress_request() {
                // Nobody is left to tell if standard error is gone.
                let _ = writeln!(io::stderr(), "    ({percent:.2}/100%)");
            }
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let at_an_end = percent <= 0.0 || percent >= 100.0;
        if at_an_end || percent > *last + STEP || percent < *last {
            *last = percent;
            // A reader that has gone does not need to be told; the command's work goes on.
            let _ = write!(io::stdout(), "    ({percent:.2}/100%)\r").and_then(|()| io::stdout().flush());
        }
    }

    /// Shows the progress of work of `total` units.
    pub(crate) fn of(&self, total: u64) -> Share<'_> {
        Share { meter: self, total, done: Mutex::new(0) }
    }

    /// Ends the command: tells what went wrong, and moves past the line of the progress.
    pub(crate) fn end(self, outcome: Outcome) -> ExitCode {
        let code = outcome.unwrap_or_else(|failure| failure.report());
        if self.shown {
            let _ = writeln!(io::stdout());
        }
        code
    }
}

/// The progress of a piece of work.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    meter: &'a Meter,
    total: u64,
    done: Mutex<u64>,
}

impl Progress for Share<'_> {
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    fn advance(&self, bytes: u64) {
        // Held while it is shown, so that numbers do not overtake each other.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done = self.total.min(done.saturating_add(bytes));
        if self.total > 0 {
            self.meter.set(*done as f64 / self.total as f64 * 100.0);
        }
    }
}
