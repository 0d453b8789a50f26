//! What a key that stands in a configuration means: one of ours, an older name of one, or one of LMCache's others.

use super::key::Key;
use super::keys::{
    ENABLE_PD, KEYS, PD_BUFFER_SIZE, PD_PEER_ALLOC_PORT, PD_PEER_HOST, PD_PEER_INIT_PORT, PD_PROXY_HOST, PD_PROXY_PORT,
    PD_ROLE,
};

/// Older names and the keys that they mean.
const OLDER_NAMES: &[(&str, &Key)] = &[
    ("enable_xpyd", &ENABLE_PD),
    ("nixl_role", &PD_ROLE),
    ("nixl_peer_host", &PD_PEER_HOST),
    ("nixl_peer_init_port", &PD_PEER_INIT_PORT),
    ("nixl_peer_alloc_port", &PD_PEER_ALLOC_PORT),
    ("nixl_proxy_host", &PD_PROXY_HOST),
    ("nixl_proxy_port", &PD_PROXY_PORT),
    ("nixl_buffer_size", &PD_BUFFER_SIZE),
];

/// The device of LMCache's storage backend, which older PD files gave as that of the PD buffer. It counts where there
/// is no `pd_buffer_device`, and is somebody else's where there is one.
pub(super) const NIXL_BUFFER_DEVICE: &str = "nixl_buffer_device";

/// LMCache's keys that say nothing to a PD transport: accepted, so that one file serves both.
const LMCACHE_KEYS: &[&str] = &[
    "app_id",
    "audit_actual_remote_url",
    "blend_check_layers",
    "blend_min_tokens",
    "blend_recompute_ratios",
    "blend_special_str",
    "blend_thresholds",
    "blocking_timeout_secs",
    "cache_policy",
    "chunk_statistics_auto_exit_target_unique_chunks",
    "chunk_statistics_auto_exit_timeout_hours",
    "chunk_statistics_auto_start_statistics",
    "chunk_statistics_strategy",
    "controller_pull_url",
    "controller_reply_url",
    "controller_url",
    "distributed_url",
    "enable_async_loading",
    "enable_blending",
    "enable_chunk_statistics",
    "enable_controller",
    "enable_hidden_state_cache",
    "enable_kv_events",
    "enable_lazy_memory_allocator",
    "enable_nixl",
    "enable_p2p",
    "enable_scheduler_bypass_lookup",
    "error_handling",
    "external_backends",
    "external_lookup_client",
    "extra_config",
    "gds_backend",
    "gds_buffer_size",
    "gds_path",
    "gds_path_sharding",
    "hidden_state_layers",
    "hidden_states_retrieve_mode",
    "hit_miss_ratio",
    "internal_api_server_enabled",
    "internal_api_server_host",
    "internal_api_server_include_index_list",
    "internal_api_server_port_start",
    "internal_api_server_socket_path_prefix",
    "lazy_memory_expand_trigger_ratio",
    "lazy_memory_initial_ratio",
    "lazy_memory_safe_size",
    "lazy_memory_step_ratio",
    "lmcache_instance_id",
    "lmcache_worker_heartbeat_delay_time",
    "lmcache_worker_heartbeat_time",
    "lmcache_worker_ids",
    "lmcache_worker_port",
    "lmcache_worker_ports",
    "local_cpu",
    "local_cpu_use_hugepages",
    "local_device",
    "local_disk",
    "local_disk_path_sharding",
    "lookup_server_worker_ids",
    "lookup_timeout_ms",
    "lookup_url",
    "maru_path",
    "maru_pool_size",
    "max_hidden_state_cpu_size",
    "max_local_cpu_size",
    "max_local_disk_size",
    "min_retrieve_tokens",
    "mp_host",
    "mp_port",
    NIXL_BUFFER_DEVICE,
    "nixl_enable_gc",
    "nixl_peer_port",
    "nixl_receiver_host",
    "nixl_receiver_port",
    "numa_mode",
    "p2p_host",
    "p2p_init_ports",
    "p2p_lookup_ports",
    "pin_check_interval_sec",
    "pin_timeout_sec",
    "plugin_locations",
    "pre_caching_hash_algorithm",
    "priority_limit",
    "py_enable_gc",
    "remote_config_url",
    "remote_serde",
    "remote_storage_plugins",
    "remote_url",
    "reserve_local_cpu_size",
    "retrieve_locations",
    "runtime_plugin_locations",
    "save_decode_cache",
    "save_unfull_chunk",
    "script_allowed_imports",
    "storage_plugins",
    "store_location",
    "use_gds",
    "use_gpu_connector_v3",
    "use_layerwise",
    "weka_path",
];

/// Keys with this prefix configure LMCache's encoder cache.
const LMCACHE_PREFIX: &str = "ec_";

/// What a name is.
#[derive(Debug)]
pub(super) enum Known {
    /// One of our keys.
    Ours(&'static Key),
    /// An older name of one of our keys.
    Older(&'static Key),
    /// A key of LMCache's that does not concern us.
    Lmcache,
    /// Nothing that anyone knows.
    Unknown,
}

pub(super) fn classify(name: &str) -> Known {
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        Known::Ours(key)
    } else if let Some((_, key)) = OLDER_NAMES.iter().find(|(older, _)| *older == name) {
        Known::Older(key)
    } else if LMCACHE_KEYS.contains(&name) || name.starts_with(LMCACHE_PREFIX) {
        Known::Lmcache
    } else {
        Known::Unknown
    }
}

/// The known name most like an unknown one, if any is much like it. Ours come before LMCache's.
pub(super) fn nearest(unknown: &str) -> Option<String> {
    // The distance costs the product of the lengths; no known name is near a long one.
    const LEN_BYTES_MAX: usize = 64;
    const LIKENESS_MIN: f64 = 0.65;
    if unknown.len() > LEN_BYTES_MAX {
        return None;
    }
    let written = unknown.to_ascii_lowercase().replace('-', "_");
    let ours = KEYS.iter().map(|key| key.name).chain(OLDER_NAMES.iter().map(|(older, _)| *older));
    let mut best: Option<(f64, &str)> = None;
    for name in ours.chain(LMCACHE_KEYS.iter().copied()) {
        let likeness = strsim::normalized_damerau_levenshtein(name, &written);
        if likeness >= LIKENESS_MIN && best.is_none_or(|(best, _)| likeness > best) {
            best = Some((likeness, name));
        }
    }
    best.map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_means_one_thing() {
        // Broken in production: a key of ours is taken for one of LMCache's and silently ignored.
        let names = KEYS.iter().map(|key| key.name);
        let all: Vec<&str> =
            names.chain(OLDER_NAMES.iter().map(|(older, _)| *older)).chain(LMCACHE_KEYS.iter().copied()).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert!(matches!(classify("pd_role"), Known::Ours(key) if key.name == "pd_role"));
        assert!(matches!(classify("nixl_role"), Known::Older(key) if key.name == "pd_role"));
        assert!(matches!(classify("local_cpu"), Known::Lmcache));
        assert!(matches!(classify("ec_chunk_size"), Known::Lmcache));
        assert!(matches!(classify("pd_rol"), Known::Unknown));
    }

    #[test]
    fn a_mistyped_key_is_recognised() {
        // Broken in production: an operator with a typing error is told "unknown key" and reads the manual.
        for (written, meant) in [
            ("pd_bufer_size", Some("pd_buffer_size")),
            ("pd-buffer-size", Some("pd_buffer_size")),
            ("PD_Buffer_Size", Some("pd_buffer_size")),
            ("buffer_size", Some("pd_buffer_size")),
            ("pd_peer_init_ports", Some("pd_peer_init_port")),
            ("allocation_timeout_sec", Some("pd_allocation_timeout_sec")),
            ("max_local_cpu_sise", Some("max_local_cpu_size")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(written).as_deref(), meant, "{written}");
        }
        assert_eq!(nearest(&"pd_buffer_size".repeat(10)), None);
    }
}
