//! Work that several threads share.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::error::{Error, Result};

/// Calls `work` for every number below `count`, and gives what it returned in order. `scratch` makes what a thread reuses.
pub(super) fn map<S, T: Send>(
    threads: NonZeroUsize,
    count: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let one_thread = || {
        let mut scratch = scratch();
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            match work(&mut scratch, at) {
                Ok(result) => done.push((at, result)),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err((at, error));
                }
            }
        }
        Ok(done)
    };
    let helpers = threads.get().min(count).saturating_sub(1);
    let parts = std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(one_thread)).collect();
        let mut parts = vec![Some(one_thread())];
        parts.extend(helpers.into_iter().map(|helper| helper.join().ok()));
        parts
    });
    let mut all = Vec::with_capacity(count);
    let mut errors: Vec<(usize, Error)> = Vec::new();
    for part in parts {
        match part {
            Some(Ok(part)) => all.extend(part),
            Some(Err(error)) => errors.push(error),
            None => std::panic::resume_unwind(Box::new("a thread of the check panicked")),
        }
    }
    errors.sort_by_key(|(at, _)| *at);
    if let Some((_, error)) = errors.into_iter().next() {
        return Err(error);
    }
    all.sort_unstable_by_key(|(at, _)| *at);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}
