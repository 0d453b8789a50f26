//! How many files this process may have open: every connection of an engine takes some.

use std::os::fd::AsFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// As many as an engine may want at once to meet one peer.
const WANTED: usize = 16;

/// Raises the limit as far as this process may: the usual 1024 are made for `select`, which nothing here uses. The limit
/// before and now, where the system says it.
pub fn raise_limit() -> (Option<u64>, Option<u64>) {
    let before = getrlimit(Resource::Nofile);
    if before.current != before.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum })
    {
        tracing::warn!(%error, "the limit of open files stays {:?}", before.current);
    }
    (before.current, getrlimit(Resource::Nofile).current)
}

/// What to tell an operator when hardly anything more can be opened. Libraries have closed what they could not use by the
/// time that they report a failure, so it tries.
pub fn shortage() -> Option<String> {
    let opened: Vec<_> = (0..WANTED).map_while(|_| std::io::stderr().as_fd().try_clone_to_owned().ok()).collect();
    if opened.len() == WANTED {
        return None;
    }
    let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    Some(format!(
        "this process can open only {} more files, its limit is {limit}; raise it (ulimit -n, LimitNOFILE)",
        opened.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_as_far_as_it_may_be() {
        // Broken in production: a daemon with a thousand peers refuses the next one on a machine that has room for it. What
        // is said when there is none is in tests/engines, whose cases have processes of their own.
        let (before, now) = raise_limit();
        assert_eq!(now, getrlimit(Resource::Nofile).maximum, "was {before:?}");
        assert_eq!(shortage(), None);
    }
}
