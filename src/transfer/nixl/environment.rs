//! What UCX must find in the environment before it is loaded.
#![allow(unsafe_code)]

use super::NIXL_ENGINE_NAME;
use crate::transfer::TransferError;

const DEFAULTS: [(&str, &str); 2] = [
    // UCX writes its log to stdout unless told otherwise, where a launcher reads the ready line.
    ("UCX_LOG_FILE", "stderr"),
    // NIXL's progress thread and the thread that posts share a lock, which is held for as long as CMA copies. UCX waits for
    // it by spinning unless told otherwise: a core burnt for nothing (docs/benchmarks.md).
    ("UCX_USE_MT_MUTEX", "y"),
];

/// Sets what NIXL's libraries read from the environment, leaving alone what is set. Call it first in `main`: the
/// environment can be changed only while one thread runs.
///
/// # Errors
/// [`TransferError::Unavailable`] when other threads run already and something would have to be set.
pub fn prepare_environment() -> Result<(), TransferError> {
    let missing = DEFAULTS.into_iter().filter(|(name, _)| std::env::var_os(name).is_none());
    for (name, value) in missing {
        if thread_count() != Some(1) {
            return Err(TransferError::Unavailable {
                engine: NIXL_ENGINE_NAME,
                reason: format!("cannot set {name} while other threads run; set {name}={value} before starting"),
            });
        }
        // SAFETY: this is the process's only thread, as just counted, and it starts none in between, so nobody
        // reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    Ok(())
}

fn thread_count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_left_alone_while_other_threads_run() {
        // Broken in production: a getenv in another thread reads freed memory.
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || stopped.recv());
        let set = || DEFAULTS.map(|(name, _)| std::env::var_os(name).is_some());
        let before = set();
        assert_eq!(prepare_environment().is_ok(), before == [true; DEFAULTS.len()]);
        assert_eq!(set(), before);
        drop(stop);
        assert!(other.join().unwrap().is_err());
    }
}
