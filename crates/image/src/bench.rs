use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use qtk_block::{BlockRead, BlockWrite};

use crate::chain::in_memory;
use crate::{Error, Image};

/// What [`bench()`] does with an image. The default is `qemu-img bench`'s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchOptions {
    /// Number of requests.
    pub count: u64,
    /// Requests under way at a time.
    pub depth: usize,
    /// Bytes of a request.
    pub buffer_size: u64,
    /// Bytes from the start of one request to that of the next.
    pub step: u64,
    /// Where the first one begins.
    pub offset: u64,
    /// Write bytes of this value, rather than read.
    pub write: Option<u8>,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { count: 75_000, depth: 64, buffer_size: 4096, step: 4096, offset: 0, write: None }
    }
}

/// Sends requests to an image, which starts over at its end, and returns how long they took. Writes are one transaction,
/// whose commit counts.
pub fn bench(image: Image, options: &BenchOptions) -> Result<Duration, Error> {
    let (path, size) = (image.path().to_owned(), image.size());
    let place = |index: u64| {
        let offset = u128::from(options.offset) + u128::from(index) * u128::from(options.step);
        // Only a request that follows another one starts over.
        let wrapped = if index == 0 || size == 0 { offset } else { offset % u128::from(size) };
        u64::try_from(wrapped).unwrap_or(u64::MAX)
    };
    let failed = |source| Error::Read { path: path.clone(), offset: options.offset, source };
    match options.write {
        None => {
            let buffer = || vec![0; in_memory(options.buffer_size)];
            let start = Instant::now();
            run(options, buffer, |buffer, index| image.read_at(buffer, place(index))).map_err(failed)?;
            Ok(start.elapsed())
        }
        Some(pattern) => {
            let transaction = image.begin()?;
            let buffer = || vec![pattern; in_memory(options.buffer_size)];
            let start = Instant::now();
            run(options, buffer, |buffer, index| transaction.write_at(buffer, place(index)))
                .map_err(Error::io(&path, "write to it"))?;
            transaction.commit()?;
            Ok(start.elapsed())
        }
    }
}

/// Sends all requests from as many threads as can be under way.
fn run(
    options: &BenchOptions,
    buffer: impl Fn() -> Vec<u8> + Sync,
    request: impl Fn(&mut [u8], u64) -> std::io::Result<()> + Sync,
) -> std::io::Result<()> {
    let next = AtomicU64::new(0);
    let work = || {
        let mut buffer = buffer();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= options.count {
                return Ok(());
            }
            if let Err(error) = request(&mut buffer, index) {
                next.store(options.count, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let threads = available_parallelism().map_or(1, usize::from).min(options.depth).max(1);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let ends = workers.into_iter().map(|worker| match worker.join() {
            Ok(end) => end,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}
