//! What a daemon is: to its peers, and to its node.

use uuid::Uuid;

use super::engine_thread::Started;
use super::ports::Ports;
use super::process;
use crate::address::AddressManager;
use crate::config::Config;
use crate::ids::{ChecksumMode, ReceiverAddress, SourceAddress, stands_for_all};
use crate::kv_layout::KvGroup;
use crate::node::{ChunkShape, IncomingSettings, NodeSettings, OutgoingSettings, Port};
use crate::wire::message::{
    CAPABILITY_AHEAD, CAPABILITY_CHECKSUMS, CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_PARK,
    CAPABILITY_VERIFYING, Hello, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN,
};

/// A name for this process that no other has had: a restarted daemon is a new peer.
pub(super) fn instance_name(config: &Config) -> String {
    format!("{}-{}-{}", config.role.as_str(), std::process::id(), Uuid::new_v4().simple())
}

pub(super) fn hello(config: &Config, instance: &str, engine: &str) -> Hello {
    let mut capabilities = [CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING].map(str::to_owned).to_vec();
    if config.rendezvous_port.is_some() {
        capabilities.push(CAPABILITY_PARK.to_owned());
    }
    if config.role.receives() {
        capabilities.push(CAPABILITY_AHEAD.to_owned());
    }
    if config.engine.checksum == ChecksumMode::Full {
        capabilities.push(CAPABILITY_CHECKSUMS.to_owned());
    }
    Hello {
        version_min: PROTOCOL_VERSION_MIN,
        version_max: PROTOCOL_VERSION,
        instance: instance.to_owned(),
        engine: engine.to_owned(),
        layout: config.layout.fingerprint(),
        capabilities,
        process: process::own_identity().cloned(),
        rendezvous: None,
    }
}

/// Where others ask for what is parked here. As in [`advertised`], an address that stands for all of them is none.
fn rendezvous(config: &Config, ports: &Ports) -> Option<SourceAddress> {
    let port = ports.number(Port::Rendezvous)?;
    let hosts = [Some(&config.rendezvous_host), config.advertise_host.as_ref()];
    let host = hosts.into_iter().flatten().find(|host| !stands_for_all(host))?;
    Some(SourceAddress { host: host.clone(), port })
}

fn chunk_shape(config: &Config) -> ChunkShape {
    let layout = &config.layout;
    let first = layout.first_group();
    ChunkShape {
        slot_bytes: layout.chunk_bytes(),
        chunk_tokens: layout.chunk_tokens,
        token_bytes: layout.groups.iter().map(KvGroup::token_bytes).collect(),
        whole: layout.groups.iter().map(|group| group.whole).collect(),
        wire_format: first.wire_format(),
        wire_shape: first.wire_shape(layout.chunk_tokens),
        dtype: first.wire_dtype().to_owned(),
    }
}

/// Where senders reach the incoming half. An address that stands for all of them is none.
fn advertised(config: &Config, ports: &Ports) -> Option<ReceiverAddress> {
    let host = config.advertise_host.as_ref().unwrap_or(&config.bind_host);
    if stands_for_all(host) {
        return None;
    }
    let (init_port, alloc_port) = (ports.number(Port::Init)?, ports.number(Port::Alloc)?);
    Some(ReceiverAddress { host: host.clone(), init_port, alloc_port })
}

/// What the node is told at start.
pub(super) fn settings(
    config: &Config,
    instance: &str,
    started: Started,
    addresses: &AddressManager,
    ports: &Ports,
) -> NodeSettings {
    let Config { deadlines, limits, .. } = config;
    NodeSettings {
        hello: Hello { rendezvous: rendezvous(config, ports), ..hello(config, instance, started.engine) },
        agent_name: started.export.agent_name,
        metadata: started.export.metadata,
        descriptors: started.export.descriptors,
        pages: started.pages,
        chunk: chunk_shape(config),
        addresses: addresses.clone(),
        len_max_bytes: config.buffer_len_bytes(),
        allocation_timeout: deadlines.allocation,
        write_timeout: deadlines.write,
        checksum: config.engine.checksum,
        requests_max: limits.requests_max as usize,
        request_chunks_max: limits.request_chunks_max as usize,
        peers_max: limits.peers_max as usize,
        heartbeat_interval: deadlines.heartbeat,
        peer_timeout: deadlines.peer,
        outgoing: config.role.sends().then(|| OutgoingSettings {
            handshake_timeout: deadlines.handshake,
            commit_timeout: deadlines.commit,
            receivers: config.receivers.clone(),
            receivers_only: config.receivers_only,
            notify_proxy: config.proxy.is_some(),
            parks: config.rendezvous_port.is_some(),
            lease: deadlines.lease,
            push_ahead: config.push_ahead,
        }),
        incoming: config.role.receives().then_some(IncomingSettings {
            wait_timeout: deadlines.wait,
            retention: deadlines.retention,
            peer_requests_max: limits.peer_requests_max as usize,
            linger: started.linger,
            prefill_hosts: config.prefill_hosts.clone(),
            advertised: advertised(config, ports),
        }),
        #[cfg(feature = "mutants")]
        without: None,
    }
}
