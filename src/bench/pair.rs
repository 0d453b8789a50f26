//! Both ends of a transfer as an engine sees them: attached, buffers mapped.

use std::time::Duration;

use crate::buffer::{BufferError, CudaDevice, CudaHandle, CudaMapping, HostHandle, HostMapping};
use crate::config::Role;
use crate::connector::ReadyLine;
use crate::connector::message::{BufferHandle, Reply, Request, Status};
use crate::ids::ReceiverAddress;

use super::daemon::Daemons;
use super::error::BenchError;
use super::link::ConnectorLink;

/// The daemons listen here: `configs/loopback.yaml`.
const HOST: &str = "127.0.0.1";

/// A daemon's buffer, opened here.
#[derive(Debug)]
enum Mapping {
    Host(HostMapping),
    Cuda(CudaMapping),
}

impl Mapping {
    fn open(buffer: BufferHandle) -> Result<Self, BufferError> {
        match buffer {
            BufferHandle::Host { pid, fd, len_bytes, inode, present_bytes } => {
                let mapping = HostMapping::open(&HostHandle { pid, fd, len_bytes, inode })?;
                // No round is to pay for page faults.
                mapping.populate(0..present_bytes)?;
                Ok(Self::Host(mapping))
            }
            BufferHandle::Cuda { pid, device, ordinal, ipc_handle, offset_bytes, allocation_bytes, len_bytes } => {
                let ipc = ipc_handle;
                let handle = CudaHandle { pid, device, ordinal, ipc, offset_bytes, allocation_bytes, len_bytes };
                Ok(Self::Cuda(CudaMapping::open(CudaDevice::of_uuid(device)?, &handle)?))
            }
        }
    }
}

/// One daemon, attached.
#[derive(Debug)]
pub(super) struct AttachedDaemon {
    /// Its connector API.
    pub link: ConnectorLink,
    /// Its buffer.
    mapping: Mapping,
    /// Its process.
    pub pid: u32,
    /// Slots in its buffer.
    pub slot_count: u32,
}

/// Both daemons, attached.
#[derive(Debug)]
pub(super) struct Pair {
    /// Where the chunks come from.
    pub sender: AttachedDaemon,
    /// Where they go.
    pub receiver: AttachedDaemon,
    /// Where the receiver listens.
    pub address: ReceiverAddress,
    /// Bytes of a whole chunk.
    pub chunk_bytes: u64,
    /// Tokens of a whole chunk.
    pub chunk_tokens: u32,
    /// The model's name in the layout, or nothing.
    pub model: String,
    /// The engine's name, as the sender's status gives it.
    pub engine: String,
}

impl Pair {
    /// Attaches to both and maps their buffers; no single answer may take longer than `patience`.
    ///
    /// # Errors
    /// When a daemon does not answer, or its buffer cannot be mapped.
    pub(super) async fn attach(daemons: &DaemonsReady, patience: Duration) -> Result<Self, BenchError> {
        let (receiver, _) = AttachedDaemon::attach(Role::Receiver, &daemons.receiver, patience).await?;
        let (mut sender, facts) = AttachedDaemon::attach(Role::Sender, &daemons.sender, patience).await?;
        let engine = sender.status().await?.engine;
        let Facts { chunk_bytes, chunk_tokens, model } = facts;
        Ok(Self { sender, receiver, address: daemons.address.clone(), chunk_bytes, chunk_tokens, model, engine })
    }

    /// Where the buffers are: `host`, `gpu`, or `mixed`.
    pub(super) const fn memory(&self) -> &'static str {
        match (&self.sender.mapping, &self.receiver.mapping) {
            (Mapping::Host(_), Mapping::Host(_)) => "host",
            (Mapping::Cuda(_), Mapping::Cuda(_)) => "gpu",
            _ => "mixed",
        }
    }

    /// Detaches from both.
    ///
    /// # Errors
    /// When a daemon does not answer.
    pub(super) async fn detach(&mut self) -> Result<(), BenchError> {
        for end in [&mut self.sender, &mut self.receiver] {
            end.link.request(|id| Request::Detach { id }).await?;
        }
        Ok(())
    }
}

/// What [`Pair::attach`] needs of the daemons, apart from them: they are watched at the same time.
#[derive(Debug, Clone)]
pub(super) struct DaemonsReady {
    sender: String,
    receiver: String,
    address: ReceiverAddress,
}

impl DaemonsReady {
    /// From the sender to the receiver.
    ///
    /// # Errors
    /// When the receiver did not say where it listens.
    pub(super) fn new(daemons: &Daemons) -> Result<Self, BenchError> {
        Self::between(&daemons.sender_ready, &daemons.receiver_ready, Role::Receiver)
    }

    /// From the receiver to the sender, where each is both.
    ///
    /// # Errors
    /// When the sender did not say where it listens.
    pub(super) fn back(daemons: &Daemons) -> Result<Self, BenchError> {
        Self::between(&daemons.receiver_ready, &daemons.sender_ready, Role::Sender)
    }

    fn between(from: &ReadyLine, to: &ReadyLine, role: Role) -> Result<Self, BenchError> {
        let (Some(init_port), Some(alloc_port)) = (to.init_port, to.alloc_port) else {
            let reason = format!("its ready line has no init_port or no alloc_port: {to:?}");
            return Err(BenchError::NotReady { role: role.as_str(), reason });
        };
        Ok(Self {
            sender: from.connector.clone(),
            receiver: to.connector.clone(),
            address: ReceiverAddress { host: HOST.to_owned(), init_port, alloc_port },
        })
    }
}

struct Facts {
    chunk_bytes: u64,
    chunk_tokens: u32,
    model: String,
}

impl AttachedDaemon {
    async fn attach(role: Role, endpoint: &str, patience: Duration) -> Result<(Self, Facts), BenchError> {
        let (link, attached) = ConnectorLink::attach(role, endpoint, patience).await?;
        let Reply::Attached { buffer, chunk_bytes, slot_count, chunk_tokens, layout, .. } = attached else {
            return Err(link.unexpected("attached", &attached));
        };
        let (BufferHandle::Host { pid, .. } | BufferHandle::Cuda { pid, .. }) = buffer;
        let mapping = Mapping::open(buffer).map_err(|source| BenchError::Buffer { role: role.as_str(), source })?;
        let model = layout.into_iter().find(|(name, _)| name == "model").map(|(_, value)| value).unwrap_or_default();
        Ok((Self { link, mapping, pid, slot_count }, Facts { chunk_bytes, chunk_tokens, model }))
    }

    /// # Errors
    /// When the daemon does not answer.
    pub(super) async fn status(&mut self) -> Result<Status, BenchError> {
        match self.link.request(|id| Request::Status { id }).await? {
            Reply::Status { status, .. } => Ok(status),
            other => Err(self.link.unexpected("status", &other)),
        }
    }

    /// # Errors
    /// When the range is outside of the buffer.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BenchError> {
        let role = self.link.role().as_str();
        let written = match &self.mapping {
            Mapping::Host(mapping) => mapping.write(offset, bytes),
            Mapping::Cuda(mapping) => mapping.write(offset, bytes),
        };
        written.map_err(|source| BenchError::Buffer { role, source })
    }

    /// # Errors
    /// When the range is outside of the buffer.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), BenchError> {
        let role = self.link.role().as_str();
        let read = match &self.mapping {
            Mapping::Host(mapping) => mapping.read(offset, bytes),
            Mapping::Cuda(mapping) => mapping.read(offset, bytes),
        };
        read.map_err(|source| BenchError::Buffer { role, source })
    }
}
