//! The NIXL agent and everything that must not outlive it.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use nixl_sys::{
    Agent, AgentConfig, Backend, MemType, MemoryRegion, NixlDescriptor, NixlError, OptArgs, RegistrationHandle,
    ThreadSync, XferDescList, XferDlistHandle, XferOp, XferRequest,
};

use super::descriptors::{MEMORY_TYPE_GPU, MEMORY_TYPE_HOST, NixlBuffer, SCRATCH_LEN_BYTES};
use super::errors::{bad_descriptors, explain, peer_error};
use super::{NIXL_ENGINE_NAME, NixlOptions, load_library};
use crate::buffer::{BufferError, CudaMemory, HostMemory, Memory};
use crate::ids::BUFFER_PIECES_MAX;
use crate::transfer::{ByteCopy, TransferError, check_next_piece};

/// An agent, its backends, and the memory registered with it. It belongs to one thread at a time.
///
/// The fields are dropped in this order: what NIXL holds of the memory, then the agent, which stops its threads and
/// closes its connections, then the memory that those could have read or written.
pub(super) struct OwnedAgent {
    buffer: Option<Buffer>,
    scratch: Option<Scratch>,
    backends: Vec<Backend>,
    agent: Agent,
    memories: Vec<Arc<Memory>>,
}

/// Our buffer: one registration for each piece. `RegistrationHandle` keeps a bare address: `OwnedAgent::memories` keeps
/// it good.
struct Buffer {
    /// Before the registrations that it describes; keeps a raw pointer to the agent, which `OwnedAgent` drops later.
    units: Option<XferDlistHandle>,
    registrations: Vec<RegistrationHandle>,
    descriptor: NixlBuffer,
    memory: Arc<Memory>,
}

/// Where peers write to warm their connections, and what we write to warm ours: memory of the buffer's kind, since what
/// is warmed is the way between two memories.
struct Scratch {
    _registration: RegistrationHandle,
    address: u64,
}

// SAFETY: `XferDlistHandle` has raw pointers to NIXL's prepared list and to the agent. Neither is tied to the thread
// that made it, both stay alive as long as `self`, and `&mut self` keeps two threads from using them at once. The
// other fields are `Send` already.
unsafe impl Send for OwnedAgent {}

/// What NIXL is told about a piece of our memory.
#[derive(Debug)]
struct AgentRegion {
    address: u64,
    len_bytes: u64,
    mem_type: MemType,
    device: u64,
}

impl MemoryRegion for AgentRegion {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.address as *const u8
    }

    fn size(&self) -> usize {
        self.len_bytes as usize
    }
}

impl NixlDescriptor for AgentRegion {
    fn mem_type(&self) -> MemType {
        self.mem_type
    }

    fn device_id(&self) -> u64 {
        self.device
    }
}

const fn mem_type(descriptor: &NixlBuffer) -> MemType {
    match descriptor.memory_type {
        MEMORY_TYPE_HOST => MemType::Dram,
        _ => MemType::Vram,
    }
}

/// Whose descriptors a list has.
pub(super) enum Side<'a> {
    Ours,
    Of(&'a str),
}

impl OwnedAgent {
    pub(super) fn start(options: &NixlOptions) -> Result<Self, TransferError> {
        let library = load_library(&options.lib_dirs)?;
        tracing::debug!(library = %library.display(), "NIXL is loaded");
        let unavailable = |reason: String| TransferError::Unavailable { engine: NIXL_ENGINE_NAME, reason };
        let config = AgentConfig {
            enable_prog_thread: true,
            // One thread owns the agent; the backend guards itself against its own progress thread.
            thread_sync: ThreadSync::None,
            pthr_delay_us: options.progress_delay_us,
            ..AgentConfig::default()
        };
        let agent = Agent::new_configured(&options.agent_name, &config)
            .map_err(|error| unavailable(format!("creating agent {:?}: {error}", options.agent_name)))?;
        if options.backends.is_empty() {
            return Err(unavailable("no backend is configured; name at least UCX".to_owned()));
        }
        let mut backends = Vec::with_capacity(options.backends.len());
        for name in &options.backends {
            let created = agent.get_plugin_params(name).and_then(|(_, params)| agent.create_backend(name, &params));
            backends.push(created.map_err(|error| {
                unavailable(format!(
                    "creating backend {name:?}: {error}; {} has {}",
                    library.display(),
                    plugins(&agent)
                ))
            })?);
        }
        Ok(Self { buffer: None, scratch: None, backends, agent, memories: Vec::new() })
    }

    fn register_scratch(&mut self, buffer: &Memory) -> Result<(), TransferError> {
        let cannot = |error: BufferError| cannot_register(buffer, &(0..SCRATCH_LEN_BYTES), error.to_string());
        let scratch = match buffer {
            Memory::Host(_) => Memory::Host(HostMemory::allocate(SCRATCH_LEN_BYTES).map_err(cannot)?),
            Memory::Cuda(cuda) => {
                let allocated = CudaMemory::allocate(Arc::clone(cuda.device()), SCRATCH_LEN_BYTES);
                Memory::Cuda(allocated.map_err(cannot)?)
            }
        };
        let (address, scratch) = (scratch.address(), Arc::new(scratch));
        let registration = self.register_region(&scratch, 0..SCRATCH_LEN_BYTES)?;
        self.scratch = Some(Scratch { _registration: registration, address });
        self.memories.push(scratch);
        Ok(())
    }

    /// Registers the first piece of the pd_buffer and prepares its units.
    pub(super) fn register(
        &mut self,
        memory: Arc<Memory>,
        unit_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), TransferError> {
        let registered_bytes = self.buffer.as_ref().map_or(0, |buffer| buffer.descriptor.len_bytes());
        check_next_piece(NIXL_ENGINE_NAME, &memory, registered_bytes, &(0..len_bytes))?;
        let registration = self.register_region(&memory, 0..len_bytes)?;
        // From here on NIXL may know of it, whatever else fails.
        self.memories.push(Arc::clone(&memory));
        self.register_scratch(&memory)?;
        let descriptor = NixlBuffer {
            address: memory.address(),
            piece_ends: vec![len_bytes],
            device: device_of(&memory),
            memory_type: memory_type(&memory),
            unit_bytes,
            scratch_address: self.scratch.as_ref().map(|scratch| scratch.address),
        };
        let units = self.prepare_our_units(&memory, &descriptor)?;
        self.buffer = Some(Buffer { units, registrations: vec![registration], descriptor, memory });
        Ok(())
    }

    /// Registers the next piece and prepares the units anew, those of the new piece among them. What to tell peers.
    ///
    /// Requests that are in progress have their own copies of what was prepared.
    pub(super) fn extend(&mut self, range: Range<u64>) -> Result<Vec<u8>, TransferError> {
        let buffer = self.buffer.as_ref().ok_or(TransferError::NotRegistered { engine: NIXL_ENGINE_NAME })?;
        let memory = Arc::clone(&buffer.memory);
        check_next_piece(NIXL_ENGINE_NAME, &memory, buffer.descriptor.len_bytes(), &range)?;
        if buffer.descriptor.piece_ends.len() == BUFFER_PIECES_MAX {
            let reason = format!("it has {BUFFER_PIECES_MAX} pieces already; raise pd_buffer_growth_step");
            return Err(cannot_register(&memory, &range, reason));
        }
        let mut descriptor = buffer.descriptor.clone();
        descriptor.piece_ends.push(range.end);
        let registration = self.register_region(&memory, range.clone())?;
        // An error from here on drops the registration: everything is as it was.
        let units = self.prepare_our_units(&memory, &descriptor)?;
        let metadata =
            self.metadata().map_err(|error| cannot_register(&memory, &range, format!("get_local_md: {error}")))?;
        if let Some(buffer) = &mut self.buffer {
            buffer.units = units;
            buffer.registrations.push(registration);
            buffer.descriptor = descriptor;
        }
        Ok(metadata)
    }

    /// The caller keeps the memory for as long as the registration.
    fn register_region(&self, memory: &Memory, range: Range<u64>) -> Result<RegistrationHandle, TransferError> {
        if let Memory::Cuda(cuda) = memory {
            // UCX takes the device from the context of the thread that registers.
            cuda.device().make_current().map_err(|error| cannot_register(memory, &range, error.to_string()))?;
        }
        let region = AgentRegion {
            address: memory.address() + range.start,
            len_bytes: range.end - range.start,
            mem_type: if matches!(memory, Memory::Host(_)) { MemType::Dram } else { MemType::Vram },
            device: device_of(memory),
        };
        self.agent.register_memory(&region, None).map_err(|error| {
            let hint = match memory {
                Memory::Host(_) => "",
                Memory::Cuda(_) => "; NIXL's UCX must be one that was built with CUDA, or use transfer_channel: local",
            };
            let reason = format!("register_memory with {} backends: {error}{hint}", self.backends.len());
            cannot_register(memory, &range, reason)
        })
    }

    fn prepare_our_units(
        &self,
        memory: &Memory,
        descriptor: &NixlBuffer,
    ) -> Result<Option<XferDlistHandle>, TransferError> {
        self.prepare_units(Side::Ours, descriptor).map_err(|error| {
            cannot_register(memory, &(0..descriptor.len_bytes()), format!("prepare_xfer_dlist: {error}"))
        })
    }

    /// The registered pd_buffer.
    pub(super) fn buffer(&self) -> Result<&NixlBuffer, TransferError> {
        self.buffer
            .as_ref()
            .map(|buffer| &buffer.descriptor)
            .ok_or(TransferError::NotRegistered { engine: NIXL_ENGINE_NAME })
    }

    pub(super) fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        self.agent.get_local_md()
    }

    /// Gets to know an agent, or more of one that is known already: NIXL 1.5.1 was seen to take the whole metadata of a
    /// known agent again and to add the ranges that are new (no partial metadata needed), while writes to it were in
    /// progress. It takes that only where everything that it knew is repeated unchanged, and forgets the agent as a whole
    /// otherwise: [`Metadata::check_grown_from`](super::metadata::Metadata::check_grown_from) comes first.
    pub(super) fn load_remote(&self, metadata: &[u8]) -> Result<String, NixlError> {
        self.agent.load_remote_md(metadata)
    }

    /// Forgets a peer. No request to it may be in progress: NIXL frees such a request when it is looked at next, and
    /// again when it is released.
    pub(super) fn forget_remote(&self, agent_name: &str) -> Result<(), NixlError> {
        self.agent.invalidate_remote_md(agent_name)
    }

    /// Says so unless the peer's metadata covers the memory that its descriptors name.
    pub(super) fn check_covered(&self, agent_name: &str, descriptor: &NixlBuffer) -> Result<(), TransferError> {
        let reason = match self.knows_remote(agent_name, descriptor) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                format!("{} bytes at {:#x} are not in its metadata", descriptor.len_bytes(), descriptor.address)
            }
            Err(error) => format!("check_remote_md: {error}"),
        };
        Err(bad_descriptors(agent_name, reason))
    }

    fn knows_remote(&self, agent_name: &str, descriptor: &NixlBuffer) -> Result<bool, NixlError> {
        let mut buffer = XferDescList::new(mem_type(descriptor))?;
        for (address, len_bytes) in descriptor.pieces() {
            buffer.add_desc(address as usize, len_bytes as usize, descriptor.device);
        }
        let mut known = self.agent.check_remote_metadata(agent_name, Some(&buffer));
        if let Some(address) = descriptor.scratch_address {
            let mut scratch = XferDescList::new(mem_type(descriptor))?;
            scratch.add_desc(address as usize, SCRATCH_LEN_BYTES as usize, descriptor.device);
            known &= self.agent.check_remote_metadata(agent_name, Some(&scratch));
        }
        Ok(known)
    }

    /// Whole units, to be named by index later. The result must be dropped before the agent.
    pub(super) fn prepare_units(
        &self,
        side: Side<'_>,
        descriptor: &NixlBuffer,
    ) -> Result<Option<XferDlistHandle>, NixlError> {
        let count = descriptor.prepared_unit_count();
        if count == 0 {
            return Ok(None);
        }
        let mut list = XferDescList::new(mem_type(descriptor))?;
        for unit in 0..count {
            let address = descriptor.address + unit * descriptor.unit_bytes;
            list.add_desc(address as usize, descriptor.unit_bytes as usize, descriptor.device);
        }
        let agent_name = match side {
            Side::Ours => "",
            Side::Of(agent_name) => agent_name,
        };
        self.agent.prepare_xfer_dlist(agent_name, &list, None).map(Some)
    }

    /// A request to write units that were prepared on both sides.
    pub(super) fn request_units(
        &self,
        remote_units: &XferDlistHandle,
        local: &[i32],
        remote: &[i32],
    ) -> Result<Option<XferRequest>, NixlError> {
        let Some(local_units) = self.buffer.as_ref().and_then(|buffer| buffer.units.as_ref()) else {
            return Ok(None);
        };
        let mut options = OptArgs::new()?;
        // They are joined already.
        options.set_skip_descriptor_merge(true)?;
        self.agent.make_xfer_req(XferOp::Write, local_units, local, remote_units, remote, Some(&options)).map(Some)
    }

    /// A request to write any ranges, each of which is inside one piece of either buffer.
    pub(super) fn request_ranges(
        &self,
        agent_name: &str,
        local: &NixlBuffer,
        remote: &NixlBuffer,
        copies: &[ByteCopy],
    ) -> Result<XferRequest, NixlError> {
        let mut local_list = XferDescList::new(mem_type(local))?;
        let mut remote_list = XferDescList::new(mem_type(remote))?;
        for copy in copies {
            let len = copy.len_bytes as usize;
            local_list.add_desc((local.address + copy.local_offset) as usize, len, local.device);
            remote_list.add_desc((remote.address + copy.remote_offset) as usize, len, remote.device);
        }
        self.agent.create_xfer_req(XferOp::Write, &local_list, &remote_list, agent_name, None)
    }

    /// Writes into the peer's scratch memory, which otherwise the first transfer would pay for: UCX wires an endpoint
    /// up, and chooses how to write, when it is first written to. `make_connection` and a notification do not do that;
    /// a read does half of it. The request while it is in progress. A peer without scratch memory stays cold.
    pub(super) fn warm_up(&self, agent_name: &str, remote: &NixlBuffer) -> Result<Option<XferRequest>, TransferError> {
        let failed =
            |operation: &'static str| move |error: NixlError| peer_error(operation, agent_name, 1, explain(&error));
        self.agent.make_connection(agent_name, None).map_err(failed("make_connection"))?;
        let Some(scratch_address) = remote.scratch_address else { return Ok(None) };
        let request = self.request_warm_up(agent_name, remote, scratch_address).map_err(failed("create_xfer_req"))?;
        let in_progress = self.post(&request).map_err(failed("first post_xfer_req"))?;
        Ok(in_progress.then_some(request))
    }

    /// A request to write our scratch memory into a peer's.
    fn request_warm_up(
        &self,
        agent_name: &str,
        remote: &NixlBuffer,
        remote_address: u64,
    ) -> Result<XferRequest, NixlError> {
        let scratch = self.scratch.as_ref().ok_or(NixlError::NotFound)?;
        let local = &self.buffer.as_ref().ok_or(NixlError::NotFound)?.descriptor;
        let mut local_list = XferDescList::new(mem_type(local))?;
        local_list.add_desc(scratch.address as usize, SCRATCH_LEN_BYTES as usize, local.device);
        let mut remote_list = XferDescList::new(mem_type(remote))?;
        remote_list.add_desc(remote_address as usize, SCRATCH_LEN_BYTES as usize, remote.device);
        self.agent.create_xfer_req(XferOp::Write, &local_list, &remote_list, agent_name, None)
    }

    /// Whether it is still in progress. Copies in the calling thread where the transport does.
    pub(super) fn post(&self, request: &XferRequest) -> Result<bool, NixlError> {
        self.agent.post_xfer_req(request, None)
    }

    /// Whether it is still in progress.
    pub(super) fn in_progress(&self, request: &XferRequest) -> Result<bool, NixlError> {
        self.agent.get_xfer_status(request).map(|status| !status.is_success())
    }
}

impl std::fmt::Debug for OwnedAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnedAgent").field("agent", &self.agent.name()).finish_non_exhaustive()
    }
}

fn device_of(memory: &Memory) -> u64 {
    match memory {
        Memory::Host(_) => 0,
        Memory::Cuda(cuda) => u64::from(cuda.device().ordinal()),
    }
}

const fn memory_type(memory: &Memory) -> u32 {
    match memory {
        Memory::Host(_) => MEMORY_TYPE_HOST,
        Memory::Cuda(_) => MEMORY_TYPE_GPU,
    }
}

fn cannot_register(memory: &Memory, range: &Range<u64>, reason: String) -> TransferError {
    let len_bytes = range.end - range.start;
    TransferError::Memory { engine: NIXL_ENGINE_NAME, kind: memory.kind(), len_bytes, reason }
}

fn plugins(agent: &Agent) -> String {
    match agent.get_available_plugins() {
        Ok(list) => list.iter().filter_map(Result::ok).collect::<Vec<_>>().join(", "),
        Err(error) => format!("no list of plugins ({error})"),
    }
}
