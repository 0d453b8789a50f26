//! How a daemon introduces itself.

use uuid::Uuid;

use super::process;
use crate::config::Config;
use crate::ids::ChecksumMode;
use crate::kv_layout::KvGroup;
use crate::node::ChunkShape;
use crate::wire::message::{
    CAPABILITY_CHECKSUMS, CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING, Hello, PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
};

/// A name for this process that no other has had: a restarted daemon is a new peer.
pub(super) fn instance_name(config: &Config) -> String {
    format!("{}-{}-{}", config.role.as_str(), std::process::id(), Uuid::new_v4().simple())
}

pub(super) fn hello(config: &Config, instance: &str, engine: &str) -> Hello {
    let mut capabilities = [CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING].map(str::to_owned).to_vec();
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
    }
}

pub(super) fn chunk_shape(config: &Config) -> ChunkShape {
    let layout = &config.layout;
    let first = layout.first_group();
    ChunkShape {
        slot_bytes: layout.chunk_bytes(),
        chunk_tokens: layout.chunk_tokens,
        token_bytes: layout.groups.iter().map(KvGroup::token_bytes).collect(),
        wire_format: first.wire_format(),
        wire_shape: first.wire_shape(layout.chunk_tokens),
        dtype: first.wire_dtype().to_owned(),
    }
}
