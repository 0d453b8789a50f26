//! A peer's process and its memory, opened here.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use super::descriptor::{HostDescriptor, LocalBuffer};
use super::devices::Devices;
use super::mapped::MappedBlocks;
use crate::buffer::{BufferError, CopyBatch, CopyEnd, CopyStream, DroppedElsewhere, HostMapping, Memory, PinnedHost};
use crate::ids::ByteCopy;

/// A process whose memory is open here. It stays valid when the process is gone; only then nobody reads it any more, so
/// bytes written there do not count.
#[derive(Debug)]
pub(super) struct LocalPeer {
    memory: OpenedMemory,
    /// What the peer told of it: how much may be written.
    descriptor: LocalBuffer,
    process: OwnedFd,
    pid: u32,
}

/// How bytes get there.
#[derive(Debug)]
enum OpenedMemory {
    /// By the thread that polls, which maps pages as it comes to them: mapping all of a large buffer takes seconds.
    Host { mapping: DroppedElsewhere<HostMapping>, mapped: MappedBlocks },
    /// By a GPU, where either end is on one.
    Device { stream: Arc<CopyStream>, target: CopyEnd },
}

impl LocalPeer {
    /// Opens what `descriptors` name, which must belong to process `pid`, for copies out of `ours`.
    pub(super) fn open(
        pid: u32,
        descriptors: &[u8],
        ours: &Arc<Memory>,
        devices: &mut Devices,
    ) -> Result<Self, PeerError> {
        let descriptor = LocalBuffer::decode(descriptors).map_err(PeerError::Descriptors)?;
        if descriptor.pid() != pid {
            return Err(PeerError::Descriptors(format!("they name process {}, its metadata {pid}", descriptor.pid())));
        }
        let raw_pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw_pid = raw_pid.ok_or_else(|| PeerError::Descriptors(format!("{pid} is no process id")))?;
        // The process before its memory: if another process had taken the pid over in between, the inode would not
        // match, and the driver would not know the handle.
        let process = rustix::process::pidfd_open(raw_pid, PidfdFlags::empty())
            .map_err(|error| PeerError::Gone(format!("process {pid}: {error}")))?;
        let memory = OpenedMemory::open(&descriptor, ours, devices)?;
        Ok(Self { memory, descriptor, process, pid })
    }

    /// The peer's buffer has grown.
    pub(super) fn update(&mut self, descriptors: &[u8]) -> Result<(), PeerError> {
        let after = LocalBuffer::decode(descriptors).map_err(PeerError::Descriptors)?;
        after.check_grown_from(&self.descriptor).map_err(PeerError::Descriptors)?;
        // The mapping covers the ceiling: only its pages are new.
        self.descriptor = after;
        Ok(())
    }

    /// How much of it may be written.
    pub(super) const fn len_bytes(&self) -> u64 {
        self.descriptor.len_bytes()
    }

    /// Copies out of our host memory into the peer's, by this thread.
    pub(super) fn write(&mut self, ours: &Memory, copy: &ByteCopy) -> Result<(), String> {
        let (Memory::Host(ours), OpenedMemory::Host { mapping, mapped }) = (ours, &mut self.memory) else {
            return Err("the memory of either end is a GPU's".to_owned());
        };
        let failed = |error: BufferError| error.to_string();
        let target = copy.remote_offset..copy.remote_offset + copy.len_bytes;
        // Not behind what the peer told of: the pages there would be taken from its machine's memory.
        if let Some(missing) = mapped.missing(&target, self.descriptor.len_bytes()) {
            mapping.populate(missing.clone()).map_err(failed)?;
            mapped.insert(&missing);
        }
        ours.copy_to(copy.local_offset, mapping, copy.remote_offset, copy.len_bytes).map_err(failed)
    }

    /// An empty batch of copies by a GPU; none where this thread copies.
    pub(super) fn batch(&self, ours: &Arc<Memory>) -> Option<CopyBatch> {
        match &self.memory {
            OpenedMemory::Host { .. } => None,
            OpenedMemory::Device { stream, target } => {
                Some(CopyBatch::new(Arc::clone(stream), CopyEnd::Memory(Arc::clone(ours)), target.clone()))
            }
        }
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

impl OpenedMemory {
    fn open(descriptor: &LocalBuffer, ours: &Arc<Memory>, devices: &mut Devices) -> Result<Self, PeerError> {
        let gone = |error: crate::buffer::BufferError| PeerError::Gone(error.to_string());
        match (descriptor, &**ours) {
            (LocalBuffer::Host(HostDescriptor { handle, .. }), Memory::Host(_)) => {
                let mapping = DroppedElsewhere::new(HostMapping::open(handle).map_err(gone)?);
                Ok(Self::Host { mapping, mapped: MappedBlocks::default() })
            }
            (LocalBuffer::Host(HostDescriptor { handle, len_bytes }), Memory::Cuda(cuda)) => {
                let mapping = HostMapping::open(handle).map_err(gone)?;
                let stream = devices.stream(cuda.device()).map_err(gone)?;
                let pinned = PinnedHost::new(mapping, Arc::clone(cuda.device()), *len_bytes);
                Ok(Self::Device { stream, target: CopyEnd::Host(pinned) })
            }
            (LocalBuffer::Cuda(handle), Memory::Cuda(cuda)) => {
                let stream = devices.stream(cuda.device()).map_err(gone)?;
                let mapping = devices.open(cuda.device(), handle).map_err(gone)?;
                Ok(Self::Device { stream, target: CopyEnd::Cuda(mapping) })
            }
            (LocalBuffer::Cuda(handle), Memory::Host(_)) => {
                let mixed = |error: crate::buffer::BufferError| {
                    PeerError::Gone(format!(
                        "its buffer is memory of {}, ours is host memory, and from here that cannot be written: {error}",
                        handle.device
                    ))
                };
                let device = devices.of_uuid(handle.device).map_err(mixed)?;
                let stream = devices.stream(&device).map_err(mixed)?;
                let mapping = devices.open(&device, handle).map_err(mixed)?;
                Ok(Self::Device { stream, target: CopyEnd::Cuda(mapping) })
            }
        }
    }
}

/// Why a peer's memory cannot be had.
#[derive(Debug)]
pub(super) enum PeerError {
    /// The bytes are not what this engine writes.
    Descriptors(String),
    /// The process or its memory is not there, or cannot be reached.
    Gone(String),
}
