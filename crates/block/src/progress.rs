use std::io;

use crate::sys;

/// Receives how far a long operation has come. Calls come from any thread.
pub trait Progress: Sync {
    /// `bytes` more of the total that the operation was started with are done.
    fn advance(&self, bytes: u64);
}

/// Reports to nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _bytes: u64) {}
}

/// Lets a user ask how far the process has come by sending it `SIGUSR1`, which then does not end it.
pub fn watch_progress_requests() -> io::Result<()> {
    sys::watch_usr1()
}

/// Whether the user has asked since the last call.
#[must_use]
pub fn take_progress_request() -> bool {
    sys::take_usr1()
}
