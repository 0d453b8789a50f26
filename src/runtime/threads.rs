//! Whether the machine lets this process have the threads that a daemon needs.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

use super::error::RuntimeError;

/// Those that are there at the same time at the start: the log, the transfer engine, the metrics, the buffer's pages, and what
/// waits for the machine beside the driver.
const NEEDED: usize = 8;

/// Starts as many threads as a daemon needs, and ends them.
///
/// # Errors
/// [`RuntimeError::Machine`], where one of them is refused: libraries that cannot have a thread panic.
pub fn check_threads() -> Result<(), RuntimeError> {
    check_with(|body| Builder::new().name("check".into()).spawn(body))
}

fn check_with(
    mut spawn: impl FnMut(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
) -> Result<(), RuntimeError> {
    // While this is held, none of them ends.
    let gate = Arc::new(RwLock::new(()));
    let held = gate.write().unwrap_or_else(PoisonError::into_inner);
    let started: Result<Vec<_>, _> = (0..NEEDED)
        .map(|_| {
            let gate = Arc::clone(&gate);
            spawn(Box::new(move || drop(gate.read())))
        })
        .collect();
    drop(held);
    match started {
        Ok(threads) => {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            Ok(())
        }
        Err(error) => Err(RuntimeError::Machine(format!(
            "the machine refuses this process a thread ({error}), and a daemon needs at least {NEEDED} beside its own; raise the \
             limit of the user (ulimit -u) or of its control group (pids.max), or end other processes"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_threads_is_an_error_and_no_panic() {
        // Broken in production: with `ulimit -u` too small a daemon ends with a panic and exit code 101, which says nothing.
        check_threads().unwrap();
        let mut left = NEEDED - 1;
        let refused = check_with(|body| {
            left = left.checked_sub(1).ok_or_else(|| io::Error::from_raw_os_error(11))?;
            Builder::new().spawn(body)
        });
        let error = refused.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("(ulimit -u)"), "{error}");
    }
}
