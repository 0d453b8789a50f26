//! A peer's process and its memory, mapped here.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::buffer::{HostHandle, HostMapping};
use crate::transfer::blob::BlobKind;

const DESCRIPTORS: BlobKind = BlobKind { magic: b"pdlocaldesc", version: 2 };

/// What is said in step two: the memory, at its ceiling's length, and how much of it may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BufferDescriptor {
    pub(super) handle: HostHandle,
    /// Grows; the memory behind the rest of the handle's length is not there yet.
    pub(super) len_bytes: u64,
}

impl BufferDescriptor {
    pub(super) fn encode(&self) -> Vec<u8> {
        DESCRIPTORS.encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let descriptor: Self = DESCRIPTORS.decode(bytes)?;
        let Self { handle, len_bytes } = descriptor;
        if len_bytes == 0 || len_bytes > handle.len_bytes {
            return Err(format!("{len_bytes} bytes of a buffer of {}", handle.len_bytes));
        }
        Ok(descriptor)
    }
}

/// A process whose memory is mapped. The mapping stays valid when the process is gone; only then nobody reads it any
/// more, so bytes written there do not count.
#[derive(Debug)]
pub(super) struct Peer {
    mapping: HostMapping,
    /// How much of the mapping the peer told of.
    len_bytes: u64,
    process: OwnedFd,
    pid: u32,
}

impl Peer {
    /// Maps what `descriptors` name, which must belong to process `pid`.
    pub(super) fn open(pid: u32, descriptors: &[u8]) -> Result<Self, PeerError> {
        let BufferDescriptor { handle, len_bytes } =
            BufferDescriptor::decode(descriptors).map_err(PeerError::Descriptors)?;
        if handle.pid != pid {
            return Err(PeerError::Descriptors(format!("they name process {}, its metadata {pid}", handle.pid)));
        }
        let raw_pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw_pid = raw_pid.ok_or_else(|| PeerError::Descriptors(format!("{pid} is no process id")))?;
        // The process before its memory: if another process had taken the pid over in between, the inode would not
        // match.
        let process = rustix::process::pidfd_open(raw_pid, PidfdFlags::empty())
            .map_err(|error| PeerError::Gone(format!("process {pid}: {error}")))?;
        let mapping = HostMapping::open(&handle).map_err(|error| PeerError::Gone(error.to_string()))?;
        Ok(Self { mapping, len_bytes, process, pid })
    }

    /// The peer's buffer has grown.
    pub(super) fn update(&mut self, descriptors: &[u8]) -> Result<(), PeerError> {
        let BufferDescriptor { handle, len_bytes } =
            BufferDescriptor::decode(descriptors).map_err(PeerError::Descriptors)?;
        let before = self.mapping.handle();
        if handle != *before {
            return Err(PeerError::Descriptors(format!("they name {handle}, before it was {before}")));
        }
        if len_bytes < self.len_bytes {
            return Err(PeerError::Descriptors(format!("{len_bytes} bytes, before it was {}", self.len_bytes)));
        }
        // The mapping covers the ceiling: only its pages are new.
        self.mapping.populate(self.len_bytes..len_bytes).map_err(|error| PeerError::Gone(error.to_string()))?;
        self.len_bytes = len_bytes;
        Ok(())
    }

    /// How much of it may be written.
    pub(super) const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    pub(super) const fn mapping(&self) -> &HostMapping {
        &self.mapping
    }

    /// Says so when the process has ended, whether or not its parent has taken notice.
    pub(super) fn check_alive(&self) -> Result<(), String> {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) => Ok(()),
            // A signal came in between: the next look will tell.
            Err(rustix::io::Errno::INTR) => Ok(()),
            Ok(_) => Err(format!("its process {} has ended", self.pid)),
            Err(error) => Err(format!("looking at its process {}: {error}", self.pid)),
        }
    }
}

/// Why a peer's memory cannot be had.
#[derive(Debug)]
pub(super) enum PeerError {
    /// The bytes are not what this engine writes.
    Descriptors(String),
    /// The process or its memory is not there.
    Gone(String),
}
