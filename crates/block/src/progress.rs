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
