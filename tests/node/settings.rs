//! What the nodes on a bench are told at start, and what they say of themselves.

use std::time::Duration;

use pd_backend::address::AddressManager;
use pd_backend::ids::{ChecksumMode, ReceiverAddress};
use pd_backend::node::{ChunkShape, IncomingSettings, NodeSettings, OutgoingSettings};
use pd_backend::wire::message::{CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, Hello};

/// Bytes of a slot on a bench, and of a full chunk: four tokens of four bytes.
pub const SLOT_BYTES: u64 = 16;

/// How one of ours introduces itself.
pub fn hello(instance: &str) -> Hello {
    Hello {
        version_min: 2,
        version_max: 2,
        instance: instance.into(),
        engine: "test".into(),
        layout: Vec::new(),
        capabilities: vec![CAPABILITY_COMMIT.into(), CAPABILITY_HEARTBEAT.into()],
        process: None,
        rendezvous: None,
    }
}

/// Of a node of `slots` slots, to which a test adds the halves that it is to have.
pub fn settings(instance: &str, slots: u64) -> NodeSettings {
    NodeSettings {
        hello: hello(instance),
        agent_name: "agent".into(),
        metadata: vec![1],
        descriptors: vec![2],
        pages: None,
        chunk: ChunkShape {
            slot_bytes: SLOT_BYTES,
            token_bytes: vec![4],
            whole: vec![false],
            chunk_tokens: 4,
            wire_format: 1,
            wire_shape: vec![2, 1, 4, 2],
            dtype: "uint8".into(),
        },
        addresses: AddressManager::with_slots(SLOT_BYTES * slots, 1, SLOT_BYTES).unwrap(),
        len_max_bytes: SLOT_BYTES * slots,
        allocation_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_secs(10),
        checksum: ChecksumMode::Off,
        requests_max: 10,
        request_chunks_max: 10,
        peers_max: 10,
        heartbeat_interval: Duration::from_secs(1),
        peer_timeout: Duration::from_secs(5),
        outgoing: None,
        incoming: None,
        without: None,
    }
}

/// Of a half that sends.
pub fn outgoing() -> OutgoingSettings {
    OutgoingSettings {
        parks: false,
        lease: Duration::from_secs(30),
        push_ahead: false,
        handshake_timeout: Duration::from_secs(10),
        commit_timeout: Duration::from_secs(9),
        receivers: Vec::new(),
        receivers_only: false,
        notify_proxy: true,
    }
}

/// Of a half that receives.
pub fn incoming() -> IncomingSettings {
    IncomingSettings {
        prefill_hosts: None,
        advertised: Some(ReceiverAddress { host: "127.0.0.1".into(), init_port: 1, alloc_port: 2 }),
        wait_timeout: Duration::from_secs(10),
        retention: Duration::from_secs(100),
        peer_requests_max: 1000,
        linger: Duration::ZERO,
    }
}
