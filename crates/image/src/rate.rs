use std::num::NonZeroU64;
use std::thread;
use std::time::{Duration, Instant};

/// Longest time that unused allowance is kept.
const BURST: Duration = Duration::from_millis(100);

/// Holds whoever passes bytes back to so many a second.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_second: NonZeroU64,
    /// When what has passed so far is paid for.
    paid: Instant,
}

impl RateLimit {
    /// A limit that begins now.
    #[must_use]
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, paid: Instant::now() }
    }

    /// Accounts for `bytes` and sleeps while more has passed than may.
    pub fn pass(&mut self, bytes: u64) {
        let now = Instant::now();
        let due = self.paid.max(now.checked_sub(BURST).unwrap_or(now));
        thread::sleep(due.saturating_duration_since(now));
        self.paid = due.checked_add(self.cost(bytes)).unwrap_or(due);
    }

    fn cost(&self, bytes: u64) -> Duration {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_no_more_pass_than_it_should() {
        let start = Instant::now();
        let mut limit = RateLimit::new(NonZeroU64::new(1_000_000).unwrap());
        for _ in 0..6 {
            limit.pass(50_000);
        }
        // The last one need not wait for itself, and a tenth of a second's worth passes at once.
        assert!(start.elapsed() >= Duration::from_millis(120), "{:?}", start.elapsed());
    }
}
