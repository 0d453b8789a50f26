//! Whether two processes can map each other's memory.

use serde::{Deserialize, Serialize};

use super::LOCAL_ENGINE_NAME;
use crate::transfer::blob::BlobKind;
use crate::transfer::{PidSpace, TransferError};

const METADATA: BlobKind = BlobKind { magic: b"pdlocalmeta", version: 1 };

/// Where a process lives: what `local` peers must have in common, and which process it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// The agent's name.
    pub(super) agent_name: String,
    /// The process.
    pub(super) pid: u32,
    /// This run of the host's kernel.
    boot_id: String,
    /// Inode of the pid namespace: pids mean the same processes only inside one.
    pid_namespace: u64,
    /// The effective user: only the same one may look into `/proc/<pid>/fd`.
    uid: u32,
}

impl Identity {
    /// This process's.
    pub(super) fn of_this_process(agent_name: String) -> Result<Self, TransferError> {
        let here = PidSpace::of_this_process().map_err(|reason| TransferError::Unavailable {
            engine: LOCAL_ENGINE_NAME,
            reason: format!("{reason}; this engine needs Linux with /proc mounted"),
        })?;
        Ok(Self {
            agent_name,
            pid: std::process::id(),
            boot_id: here.boot_id,
            pid_namespace: here.pid_namespace,
            uid: rustix::process::geteuid().as_raw(),
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        METADATA.encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        METADATA.decode(bytes)
    }

    /// Says what keeps `self` from mapping `peer`'s memory.
    pub(super) fn check_peer(&self, peer: &Self) -> Result<(), String> {
        let cure = "use transfer_channel: nixl";
        if peer.boot_id != self.boot_id {
            return Err(format!(
                "it runs on another host (boot id {}, ours is {}); {cure}",
                peer.boot_id, self.boot_id
            ));
        }
        if peer.pid_namespace != self.pid_namespace {
            return Err(format!(
                "it runs in another pid namespace ({}, ours is {}); share one between the containers, or {cure}",
                peer.pid_namespace, self.pid_namespace
            ));
        }
        if peer.uid != self.uid {
            return Err(format!("it runs as uid {}, we as {}; run both as one user, or {cure}", peer.uid, self.uid));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_elsewhere_is_refused_with_both_values_and_the_cure() {
        // Broken in production: a sender maps the memory of an unrelated process that has the receiver's pid.
        let ours = Identity::of_this_process("pd".to_owned()).unwrap();
        assert_eq!(Identity::decode(&ours.encode()).as_ref(), Ok(&ours));
        assert_eq!(ours.check_peer(&ours), Ok(()));
        let host = ours.check_peer(&Identity { boot_id: "elsewhere".to_owned(), ..ours.clone() }).unwrap_err();
        assert!(host.contains("another host") && host.contains("elsewhere") && host.contains("nixl"), "{host}");
        let namespace = ours.check_peer(&Identity { pid_namespace: 1, ..ours.clone() }).unwrap_err();
        assert!(namespace.contains("another pid namespace"), "{namespace}");
        let user = ours.check_peer(&Identity { uid: ours.uid + 1, ..ours.clone() }).unwrap_err();
        assert!(user.contains(&format!("uid {}", ours.uid + 1)), "{user}");
    }
}
