//! The system calls that no safe crate wraps. The only module of the workspace with `unsafe` code.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// Kind of a one-byte open-file-description lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteLock {
    Shared,
    Exclusive,
    Release,
}

fn flock_request(kind: ByteLock, byte: u64) -> io::Result<libc::flock> {
    let lock_type = match kind {
        ByteLock::Shared => libc::F_RDLCK,
        ByteLock::Exclusive => libc::F_WRLCK,
        ByteLock::Release => libc::F_UNLCK,
    };
    // SAFETY: `flock` is plain old data, for which all zeroes is a valid value.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = i16::try_from(lock_type).map_err(io::Error::other)?;
    request.l_whence = i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?;
    request.l_start = libc::off_t::try_from(byte).map_err(io::Error::other)?;
    request.l_len = 1;
    Ok(request)
}

/// Takes or releases the lock on one byte of `file` without waiting. A lock held elsewhere is `WouldBlock`.
pub(crate) fn ofd_set_lock(file: &File, kind: ByteLock, byte: u64) -> io::Result<()> {
    let request = flock_request(kind, byte)?;
    // SAFETY: the descriptor is open for the call's duration, and `request` outlives it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        _ => Err(error),
    }
}

/// Whether some other open file description holds a lock on the byte that an exclusive lock would conflict with.
pub(crate) fn ofd_is_locked_elsewhere(file: &File, byte: u64) -> io::Result<bool> {
    let mut request = flock_request(ByteLock::Exclusive, byte)?;
    // SAFETY: the descriptor is open for the call's duration, and `request` is exclusively borrowed by it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}

/// Lets the host begin to write a file's changed pages to its disk, without waiting for them.
///
/// Only a hint: where it fails nothing is lost, and an error of the disk comes back from the fsync that follows.
pub(crate) fn start_writeback(file: &File) {
    // SAFETY: the descriptor is open for the call's duration, and no memory is passed.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Lets a range of `target` have its blocks in common with as many bytes of `source` from `from` on.
pub(crate) fn clone_range(source: &File, target: &File, from: u64, range: Range<u64>) -> io::Result<()> {
    let request = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: from,
        src_length: range.end - range.start,
        dest_offset: range.start,
    };
    // SAFETY: both descriptors are open for the call's duration, and `request` outlives it.
    let result = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Set by `SIGUSR1`.
static USR1: AtomicBool = AtomicBool::new(false);

extern "C" fn note_usr1(_: libc::c_int) {
    USR1.store(true, Ordering::Relaxed);
}

/// From now on `SIGUSR1` does not end the process: [`take_usr1`] tells of it. System calls go on.
pub(crate) fn watch_usr1() -> io::Result<()> {
    // SAFETY: `sigaction` is plain old data, for which all zeroes is a valid value: an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = note_usr1 as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: `action` outlives the call, and its handler does nothing but store to an atomic.
    let result = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether `SIGUSR1` came since the last call.
pub(crate) fn take_usr1() -> bool {
    USR1.swap(false, Ordering::Relaxed)
}
