//! Processes: who we are, and when another one ends.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

use crate::wire::message::ProcessIdentity;

/// This process, as a peer on the same host can find it. None where /proc does not say.
pub(super) fn own_identity() -> Option<ProcessIdentity> {
    identity_of(std::process::id())
}

/// Resolves when the process has ended; at once, when it is not there any more. Never, when the process is none of
/// this host and pid namespace, since then nothing can be known.
pub(super) async fn ended(process: ProcessIdentity) {
    match look_at(&process) {
        Seen::Gone => {}
        Seen::There(pidfd) => readable(pidfd).await,
        Seen::Elsewhere => std::future::pending().await,
        Seen::Hidden(error) => cannot_watch(error).await,
    }
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
    if !own_identity().is_some_and(|own| own.sees(process)) {
        return Seen::Elsewhere;
    }
    match open_pidfd(process.pid) {
        // Opened first, compared after: another process under that pid by now means that the one asked after has
        // ended. When /proc will not say, the descriptor is taken at its word.
        Ok(_) if identity_of(process.pid).is_some_and(|now| now != *process) => Seen::Gone,
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
    tracing::warn!(%reason, "a process cannot be watched; its end will be noticed by its connections alone");
    std::future::pending().await
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

fn identity_of(pid: u32) -> Option<ProcessIdentity> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
    let pid_namespace = rustix::fs::stat("/proc/self/ns/pid").ok()?.st_ino;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold spaces and brackets; field 22, the start time, is the 20th after the last bracket.
    let after_name = stat.rsplit_once(')')?.1;
    let start_ticks = after_name.split_whitespace().nth(19)?.parse().ok()?;
    Some(ProcessIdentity { boot_id, pid_namespace, pid, start_ticks })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed_and_a_reused_pid_is_not_taken_for_it() {
        // Broken in production: slots of a killed sender stay quarantined for good, or are freed while it writes.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = identity_of(child.id()).unwrap();
        assert_ne!(Some(&identity), own_identity().as_ref());
        let mut later = identity.clone();
        later.start_ticks += 1;
        assert!(has_ended(&later) && !has_ended(&identity));
        tokio::time::timeout(Duration::from_secs(5), ended(later)).await.expect("another process under that pid");
        let alive = tokio::time::timeout(Duration::from_millis(50), ended(identity.clone())).await;
        assert!(alive.is_err(), "it has not ended");
        let mut elsewhere = identity.clone();
        elsewhere.boot_id = "another host".into();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&identity) && !has_ended(&elsewhere));
        tokio::time::timeout(Duration::from_secs(5), ended(identity)).await.expect("it has ended");
        assert!(tokio::time::timeout(Duration::from_millis(50), ended(elsewhere)).await.is_err());
    }
}
