//! Processes: who we are, and when another one ends.

use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

use crate::transfer::PidSpace;
use crate::wire::message::ProcessIdentity;

/// This process, as a peer on the same host can find it. None where /proc does not say. Looked up once.
pub(super) fn own_identity() -> Option<&'static ProcessIdentity> {
    static OWN: LazyLock<Option<ProcessIdentity>> = LazyLock::new(|| {
        let PidSpace { boot_id, pid_namespace } = PidSpace::of_this_process().ok()?;
        let pid = std::process::id();
        Some(ProcessIdentity { boot_id, pid_namespace, pid, start_ticks: start_ticks_of(pid)? })
    });
    OWN.as_ref()
}

/// Whether the process is of this host and pid namespace, so that something can be known of it.
pub(super) fn is_seen_from_here(process: &ProcessIdentity) -> bool {
    own_identity().is_some_and(|own| own.sees(process))
}

/// What resolves when the process has ended; at once, when it is not there any more. None, when the process cannot be
/// seen from here.
pub(super) fn watch(process: &ProcessIdentity) -> Option<impl Future<Output = ()> + Send + use<>> {
    let pidfd = match look_at(process) {
        Seen::Gone => None,
        Seen::There(pidfd) => Some(pidfd),
        Seen::Elsewhere => return None,
        Seen::Hidden(error) => {
            note_unwatched(error);
            return None;
        }
    };
    Some(async move {
        if let Some(pidfd) = pidfd {
            readable(pidfd).await;
        }
    })
}

/// Whether the process is known to have ended, as of now.
pub(super) fn has_ended(process: &ProcessIdentity) -> bool {
    match look_at(process) {
        Seen::Gone => true,
        Seen::There(pidfd) => {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            // A pidfd becomes readable when its process ends, and stays so.
            matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
        }
        Seen::Elsewhere | Seen::Hidden(_) => false,
    }
}

/// What can be found out about a process.
enum Seen {
    /// It has ended, and perhaps another has its pid.
    Gone,
    /// A descriptor of it, which may have ended.
    There(OwnedFd),
    /// It is of another host or pid namespace.
    Elsewhere,
    /// The kernel does not let us look.
    Hidden(Errno),
}

fn look_at(process: &ProcessIdentity) -> Seen {
    if !is_seen_from_here(process) {
        return Seen::Elsewhere;
    }
    match open_pidfd(process.pid) {
        // Opened first, compared after: another process under that pid by now means that the one asked after has
        // ended. When /proc will not say, the descriptor is taken at its word.
        Ok(_) if start_ticks_of(process.pid).is_some_and(|ticks| ticks != process.start_ticks) => Seen::Gone,
        Ok(pidfd) => Seen::There(pidfd),
        Err(Errno::SRCH) => Seen::Gone,
        Err(error) => Seen::Hidden(error),
    }
}

/// Resolves when the process that started us has ended, even if it had before we looked.
pub(super) async fn parent_ended() {
    // None: it is in another pid namespace, and cannot be watched from this one.
    let Some(parent) = rustix::process::getppid() else {
        return cannot_watch("the parent is in another pid namespace").await;
    };
    match open_pidfd(parent.as_raw_nonzero().get().unsigned_abs()) {
        Ok(pidfd) if rustix::process::getppid() == Some(parent) => readable(pidfd).await,
        Ok(_) | Err(Errno::SRCH) => {}
        Err(error) => cannot_watch(error).await,
    }
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::NONBLOCK)
}

/// Not being able to look is not the same as having ended: nothing is concluded from it.
async fn cannot_watch(reason: impl std::fmt::Display) {
    note_unwatched(reason);
    std::future::pending().await
}

fn note_unwatched(reason: impl std::fmt::Display) {
    tracing::warn!(%reason, "a process cannot be watched; its end will be noticed by its connections alone");
}

async fn readable(pidfd: OwnedFd) {
    #[expect(deprecated, reason = "sound for a descriptor that it owns; its successor is an unsafe function")]
    let watched = AsyncFd::new(pidfd);
    match watched {
        // A pidfd becomes readable when its process ends, and stays so.
        Ok(pidfd) => drop(pidfd.readable().await),
        Err(error) => cannot_watch(error).await,
    }
}

fn start_ticks_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold spaces and brackets; field 22, the start time, is the 20th after the last bracket.
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed_and_a_reused_pid_is_not_taken_for_it() {
        // Broken in production: slots of a killed sender stay quarantined for good, or are freed while it writes.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let own = own_identity().unwrap().clone();
        let identity =
            ProcessIdentity { pid: child.id(), start_ticks: start_ticks_of(child.id()).unwrap(), ..own.clone() };
        assert_ne!(identity, own);
        let mut later = identity.clone();
        later.start_ticks += 1;
        assert!(has_ended(&later) && !has_ended(&identity));
        let ends = |process: &ProcessIdentity| watch(process).expect("it can be seen from here");
        tokio::time::timeout(Duration::from_secs(5), ends(&later)).await.expect("another process under that pid");
        let alive = tokio::time::timeout(Duration::from_millis(50), ends(&identity)).await;
        assert!(alive.is_err(), "it has not ended");
        let mut elsewhere = identity.clone();
        elsewhere.boot_id = "another host".into();
        let watched_alive = ends(&identity);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&identity) && !has_ended(&elsewhere));
        for ended in [watched_alive, ends(&identity)] {
            tokio::time::timeout(Duration::from_secs(5), ended).await.expect("it has ended");
        }
        assert!(watch(&elsewhere).is_none(), "nothing can be known of it");
    }
}
