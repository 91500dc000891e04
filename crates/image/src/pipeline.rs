//! Work on all cores, results in order, memory bounded.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::Error;

/// Units that may be done ahead of the one that is due, besides one in each thread's hands.
const AHEAD: u64 = 4;

/// Units besides one in each thread's hands: those done ahead, and the one that is being consumed.
pub(crate) const BESIDES: u64 = AHEAD + 1;

/// What the consumer of results wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Continue,
    Stop,
}

/// Runs `work` on the `jobs` in `threads` threads and gives the results to `consume`, in the order of the jobs, on the
/// calling thread. `worker` makes what each thread keeps from job to job.
///
/// The first error in that order ends everything, and so does a panic. `path` is what the work is for.
pub(crate) fn ordered<Job: Send, Worker, Done: Send>(
    path: &Path,
    threads: usize,
    jobs: impl Iterator<Item = Result<Job, Error>> + Send,
    worker: impl Fn() -> Result<Worker, Error> + Sync,
    work: impl Fn(&mut Worker, Job) -> Result<Done, Error> + Sync,
    mut consume: impl FnMut(Done) -> Result<Next, Error>,
) -> Result<(), Error> {
    let threads = threads.max(1);
    let window = Window::new(threads as u64 + AHEAD);
    let jobs = Mutex::new((0, jobs));
    let run = || {
        let _ends_all = EndOnPanic(&window);
        let mut state = None;
        while let Some((index, job)) = take(&window, &jobs) {
            let done = job.and_then(|job| match state.take() {
                Some(kept) => work(state.insert(kept), job),
                None => work(state.insert(worker()?), job),
            });
            window.put(index, done);
        }
    };
    thread::scope(|scope| {
        let _ends_workers = EndOnDrop(&window);
        let mut handles = Vec::new();
        for _ in 0..threads {
            match thread::Builder::new().spawn_scoped(scope, run) {
                Ok(handle) => handles.push(handle),
                // Fewer threads do as well.
                Err(_) if !handles.is_empty() => break,
                Err(source) => return Err(Error::io(path, "start a thread for it")(source)),
            }
        }
        let outcome = loop {
            match window.take() {
                Taken::Done(done) => match done.and_then(&mut consume) {
                    Ok(Next::Continue) => {}
                    Ok(Next::Stop) => break Ok(()),
                    Err(error) => break Err(error),
                },
                Taken::End => break Ok(()),
                Taken::Panicked => break Err(Error::WorkerPanicked { path: path.to_owned() }),
            }
        };
        window.end(false);
        // Joined here, as the scope would pass a panic on.
        handles.into_iter().for_each(|handle| drop(handle.join()));
        outcome
    })
}

fn take<Job, Done>(window: &Window<Done>, jobs: &Mutex<(u64, impl Iterator<Item = Job>)>) -> Option<(u64, Job)> {
    let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    let index = jobs.0;
    if !window.wait_for_room(index) {
        return None;
    }
    let job = jobs.1.next();
    match job {
        Some(job) => {
            jobs.0 += 1;
            Some((index, job))
        }
        None => {
            window.set_total(index);
            None
        }
    }
}

/// Results that wait for their turn.
struct Window<Done> {
    room: u64,
    state: Mutex<State<Done>>,
    /// The consumer waits for this: what it wants next is there, or never will be.
    due: Condvar,
    /// And the worker whose job is next for this: it may begin, or no job is to begin any more.
    freed: Condvar,
}

struct State<Done> {
    due: u64,
    done: BTreeMap<u64, Result<Done, Error>>,
    total: Option<u64>,
    ended: bool,
    panicked: bool,
}

enum Taken<Done> {
    Done(Result<Done, Error>),
    End,
    Panicked,
}

impl<Done> Window<Done> {
    fn new(room: u64) -> Self {
        let state = State { due: 0, done: BTreeMap::new(), total: None, ended: false, panicked: false };
        Self { room, state: Mutex::new(state), due: Condvar::new(), freed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<Done>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, index: u64, done: Result<Done, Error>) {
        let mut state = self.lock();
        state.done.insert(index, done);
        let is_due = index == state.due;
        drop(state);
        if is_due {
            self.due.notify_one();
        }
    }

    fn set_total(&self, total: u64) {
        self.lock().total = Some(total);
        self.due.notify_one();
    }

    fn end(&self, panicked: bool) {
        let mut state = self.lock();
        state.ended = true;
        state.panicked |= panicked;
        drop(state);
        self.due.notify_one();
        self.freed.notify_one();
    }

    /// Waits until job `index`, the next one, may begin. False if no more jobs are to begin.
    fn wait_for_room(&self, index: u64) -> bool {
        let full = |state: &mut State<Done>| !state.ended && index >= state.due + self.room;
        let state = self.freed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        !state.ended
    }

    fn take(&self) -> Taken<Done> {
        let waiting = |state: &mut State<Done>| {
            !state.panicked && state.total != Some(state.due) && !state.done.contains_key(&state.due)
        };
        let mut state = self.due.wait_while(self.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        let due = state.due;
        match state.done.remove(&due) {
            Some(done) => {
                state.due += 1;
                drop(state);
                self.freed.notify_one();
                Taken::Done(done)
            }
            None if state.panicked => Taken::Panicked,
            None => Taken::End,
        }
    }
}

/// Lets the workers end when the consumer is gone, panicking or not.
struct EndOnDrop<'a, Done>(&'a Window<Done>);

impl<Done> Drop for EndOnDrop<'_, Done> {
    fn drop(&mut self) {
        self.0.end(false);
    }
}

/// Lets everything end when a worker panics.
struct EndOnPanic<'a, Done>(&'a Window<Done>);

impl<Done> Drop for EndOnPanic<'_, Done> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    fn invalid(problem: &str) -> Error {
        Error::Invalid { path: "out".into(), problem: problem.to_owned() }
    }

    fn squares(
        threads: usize,
        jobs: u64,
        work: impl Fn(u64) -> Result<u64, Error> + Sync,
    ) -> (Vec<u64>, Result<(), Error>) {
        let mut seen = Vec::new();
        let result = ordered(
            Path::new("out"),
            threads,
            (0..jobs).map(Ok),
            || Ok(()),
            |(), job| work(job),
            |done| {
                seen.push(done);
                Ok(Next::Continue)
            },
        );
        (seen, result)
    }

    #[test]
    fn results_come_in_order_and_not_far_ahead() {
        for threads in [1, 2, 7] {
            let begun = AtomicU64::new(0);
            let (seen, result) = squares(threads, 200, |job| {
                begun.fetch_max(job, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(job * 7919 % 300));
                Ok(job * job)
            });
            result.unwrap();
            assert_eq!(seen, (0..200).map(|job| job * job).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let (seen, result) = squares(3, 1_000_000, |job| if job % 50 == 49 { Err(invalid("49")) } else { Ok(job) });
        assert_eq!(seen.len(), 49);
        assert!(matches!(result, Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_panic_ends_the_work() {
        let (_, result) = squares(3, 1_000_000, |job| if job == 20 { panic!("on purpose") } else { Ok(job) });
        assert!(matches!(result, Err(Error::WorkerPanicked { .. })));
    }

    #[test]
    fn a_worker_that_cannot_start_is_an_error() {
        let jobs = (0..10).map(Ok);
        let worker = || Err::<(), _>(invalid("no memory"));
        let result = ordered(Path::new("out"), 2, jobs, worker, |(), job: u64| Ok(job), |_| Ok(Next::Continue));
        assert!(matches!(result, Err(Error::Invalid { .. })));
    }

    #[test]
    fn failed_jobs_and_consumers_end_the_work() {
        let jobs = (0..100).map(|job| if job == 10 { Err(invalid("planner")) } else { Ok(job) });
        let result = ordered(Path::new("out"), 2, jobs, || Ok(()), |(), job: u64| Ok(job), |_| Ok(Next::Continue));
        assert!(result.is_err());
        let stop = ordered(
            Path::new("out"),
            2,
            (0..).map(Ok),
            || Ok(()),
            |(), job: u64| Ok(job),
            |done| Ok(if done == 5 { Next::Stop } else { Next::Continue }),
        );
        stop.unwrap();
    }
}
