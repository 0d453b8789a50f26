//! Between the node's words and the connector API's.

use std::time::Duration;

use crate::address::UsageSnapshot;
use crate::buffer::{Memory, MemoryManager};
use crate::config::Config;
use crate::connector::message::CONNECTOR_API_VERSION;
use crate::connector::message::{BufferHandle, BufferUsage, Group, ReceiverState, ReceiverStatus, Reply, Timings};
use crate::ids::{Failure, ReceiverAddress, Seq};
use crate::node::{Answer, outgoing};

pub(super) fn error(id: Seq, failure: Failure, peer: Option<String>) -> Reply {
    Reply::Error { id, kind: failure.kind, text: failure.text, peer }
}

pub(super) fn attached(id: Seq, config: &Config, manager: &MemoryManager) -> Reply {
    Reply::Attached {
        id,
        version: CONNECTOR_API_VERSION,
        role: config.role.as_str().to_owned(),
        buffer: buffer_handle(manager),
        chunk_bytes: config.layout.chunk_bytes(),
        slot_count: config.buffer.slot_count,
        chunk_tokens: config.layout.chunk_tokens,
        groups: config
            .layout
            .groups
            .iter()
            .map(|group| Group { name: group.name.clone(), token_bytes: group.token_bytes() })
            .collect(),
        layout: config.layout.fingerprint(),
    }
}

/// How a client gets at the buffer.
fn buffer_handle(manager: &MemoryManager) -> BufferHandle {
    match &**manager.memory() {
        Memory::Host(host) => {
            let handle = host.handle();
            BufferHandle::Host {
                pid: handle.pid,
                fd: handle.fd,
                len_bytes: handle.len_bytes,
                inode: handle.inode,
                present_bytes: manager.addresses().len_bytes(),
            }
        }
        Memory::Cuda(cuda) => {
            let handle = cuda.handle();
            BufferHandle::Cuda {
                pid: handle.pid,
                device: handle.device,
                ordinal: handle.ordinal,
                ipc_handle: handle.ipc,
                offset_bytes: handle.offset_bytes,
                allocation_bytes: handle.allocation_bytes,
                len_bytes: handle.len_bytes,
            }
        }
    }
}

/// How full and how fragmented the buffer is.
pub(super) fn buffer_usage(config: &Config, manager: &MemoryManager) -> BufferUsage {
    let layout = &config.layout;
    let lens: Vec<u64> = layout.groups.iter().map(|group| group.partial_bytes(layout.chunk_tokens)).collect();
    let UsageSnapshot { usage, fits } = manager.addresses().snapshot(&lens);
    BufferUsage {
        len_bytes: usage.len_bytes,
        len_max_bytes: config.buffer_len_bytes(),
        used_bytes: usage.used_bytes,
        free_bytes: usage.free_bytes,
        largest_free_bytes: usage.largest_free_bytes,
        free_range_count: usage.free_range_count as u64,
        chunks_fit: fits,
    }
}

pub(super) fn wait(wait_ms: Option<u64>) -> Option<Duration> {
    wait_ms.map(Duration::from_millis)
}

pub(super) fn receiver((address, state): (&ReceiverAddress, &outgoing::ConnectState)) -> ReceiverStatus {
    use outgoing::ConnectState::{Connected, Connecting, Refused, Unreachable};
    let (state, failure) = match state {
        Connecting => (ReceiverState::Connecting, None),
        Connected => (ReceiverState::Connected, None),
        Refused(failure) => (ReceiverState::Refused, Some(failure)),
        Unreachable(failure) => (ReceiverState::Unreachable, Some(failure)),
    };
    ReceiverStatus { address: address.clone(), state, failure: failure.cloned() }
}

pub(super) fn answer(id: Seq, answer: Answer) -> Reply {
    match answer {
        Answer::Opened { request, already_sent, slots } => Reply::Opened { id, req_id: request, already_sent, slots },
        Answer::Staged { slots } => Reply::Staged { id, slots },
        Answer::Accepted => Reply::Accepted { id },
        Answer::Ready { request, lease, chunks } => Reply::Ready { id, req_id: request, lease, chunks },
        Answer::Found { lease, chunks, granted, coming } => Reply::Found { id, lease, chunks, granted, coming },
        Answer::Held => Reply::Held { id },
        Answer::Released => Reply::Released { id },
        Answer::Cancelled { request } => Reply::Cancelled { id, req_id: request },
        Answer::Reset => Reply::Reset { id },
        Answer::Failed { failure, peer } => error(id, failure, peer),
    }
}

pub(super) fn event(event: outgoing::Event) -> Reply {
    match event {
        outgoing::Event::Sent { request, chunks, bytes, phases } => Reply::Sent {
            req_id: request,
            chunks,
            bytes,
            timings: Timings {
                alloc_us: phases.alloc.as_micros() as u64,
                transfer_us: phases.transfer.as_micros() as u64,
                commit_us: phases.commit.as_micros() as u64,
            },
        },
        outgoing::Event::Parked { request, chunks } => Reply::Parked { req_id: request, chunks },
        outgoing::Event::Failed { request, failure, peer } => {
            Reply::Failed { req_id: request, kind: failure.kind, text: failure.text, peer }
        }
    }
}
