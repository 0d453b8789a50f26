//! Long work on a range, cut into slices that several threads take turns at.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// What a thread takes at a time. From 4 to 64 MiB it makes no difference to the speed.
const SLICE_LEN_BYTES: u64 = 16 * 1024 * 1024;
/// More threads than this get in each other's way: the system hands the pages of one file out under one lock.
const THREADS_MAX: usize = 8;

/// As many threads as the machine has room for.
pub(super) fn thread_count() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX)
}

/// Has `work` done for every part of `range`, by this thread and up to `threads - 1` others. Slices end at multiples of
/// [`SLICE_LEN_BYTES`], so no two of them share a page.
///
/// # Errors
/// The first error of `work`. No slice is begun after it, and none is under way any more when this returns.
pub(super) fn for_slices(
    range: Range<u64>,
    threads: usize,
    work: impl Fn(Range<u64>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let end_of = |start: u64| (start - start % SLICE_LEN_BYTES).saturating_add(SLICE_LEN_BYTES).min(range.end);
    let next = AtomicU64::new(range.start);
    let take_turns = || -> io::Result<()> {
        loop {
            let step = |start: u64| (start < range.end).then(|| end_of(start));
            let Ok(start) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step) else { return Ok(()) };
            if let Err(error) = work(start..end_of(start)) {
                next.store(range.end, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let slice_count = range.end.saturating_sub(range.start).div_ceil(SLICE_LEN_BYTES);
    let helper_count = usize::try_from(slice_count).unwrap_or(usize::MAX).min(threads).saturating_sub(1);
    thread::scope(|scope| {
        // A helper that the system does not give is not needed: the others take its slices.
        let helpers: Vec<_> = (0..helper_count)
            .map_while(|_| thread::Builder::new().name("pages".into()).spawn_scoped(scope, take_turns).ok())
            .collect();
        let own = take_turns();
        helpers.into_iter().fold(own, |result, helper| {
            let helped = helper.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
            result.and(helped)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};
    use std::time::Duration;

    use super::*;

    #[test]
    fn slices_cover_the_range_once_and_share_no_page() {
        // Broken in production: a part of the buffer has no pages, and the first transfers there take page faults.
        for (start, len_bytes) in [(0, 0), (7, 1), (0, SLICE_LEN_BYTES), (4097, 3 * SLICE_LEN_BYTES + 5)] {
            for threads in [0, 1, 3, 100] {
                let seen = Mutex::new(Vec::new());
                let range = start..start + len_bytes;
                for_slices(range.clone(), threads, |slice| {
                    seen.lock().unwrap().push(slice);
                    Ok(())
                })
                .unwrap();
                let mut seen = seen.into_inner().unwrap();
                seen.sort_by_key(|slice| slice.start);
                let end = seen.iter().fold(range.start, |end, slice| {
                    assert_eq!(slice.start, end);
                    assert!(end == range.start || end % SLICE_LEN_BYTES == 0);
                    slice.end
                });
                assert_eq!(end, range.end);
            }
        }
    }

    #[test]
    fn two_threads_are_at_it_at_once() {
        // Broken in production: a daemon with a large buffer takes as long to start as one core needs for all its pages.
        let (inside, arrived) = (Mutex::new(0), Condvar::new());
        for_slices(0..2 * SLICE_LEN_BYTES, 2, |_| {
            *inside.lock().unwrap() += 1;
            arrived.notify_all();
            let alone = |inside: &mut u32| *inside < 2;
            let waited = arrived.wait_timeout_while(inside.lock().unwrap(), Duration::from_secs(60), alone).unwrap();
            assert!(!waited.1.timed_out(), "the other slice waits for this one");
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn an_error_ends_the_work_and_is_told() {
        // Broken in production: a machine that is short of memory starts a daemon with a hole in its buffer.
        for threads in [1, 4] {
            let result = for_slices(0..1000 * SLICE_LEN_BYTES, threads, |slice| {
                assert!(slice.start < 500 * SLICE_LEN_BYTES, "it goes on");
                if slice.start == 5 * SLICE_LEN_BYTES { Err(io::Error::other("no more")) } else { Ok(()) }
            });
            assert_eq!(result.unwrap_err().to_string(), "no more");
        }
    }
}
