//! Every key that may stand in a configuration: ours, their older names, and LMCache's others.

/// One of our keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// As it is written.
    pub name: &'static str,
    /// Which values it may have.
    pub accepted: &'static str,
    /// One of them.
    pub example: &'static str,
}

macro_rules! keys {
    ($($constant:ident = $name:literal, $accepted:expr, $example:literal;)*) => {
        $(pub(super) static $constant: Key = Key { name: $name, accepted: $accepted, example: $example };)*
        /// All of our keys.
        pub(super) static KEYS: &[&Key] = &[$(&$constant),*];
    };
}

use super::size::SIZE_ACCEPTED;

const BOOLEAN: &str = "true or false";
const PORTS: &str = "a port from 0 to 65535, or a list of one such port per rank";
const SECONDS: &str = "a number of seconds in range";
const HOST: &str = "a host name or an address, without scheme and port";

keys! {
    ENABLE_PD = "enable_pd", BOOLEAN, "true";
    PD_ROLE = "pd_role", "sender, receiver or both", "both";
    MODEL_NAME = "model_name", "text of 1 to 256 bytes", "meta-llama/Meta-Llama-3-8B";
    CHUNK_SIZE = "chunk_size", "a number of tokens from 1 to 1048576", "256";
    KV_CACHE_DTYPE = "kv_cache_dtype",
        "auto, bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8", "auto";
    PD_BUFFER_SIZE = "pd_buffer_size", SIZE_ACCEPTED, "4GiB";
    PD_BUFFER_INITIAL_SIZE = "pd_buffer_initial_size", SIZE_ACCEPTED, "512MiB";
    PD_BUFFER_GROWTH_STEP = "pd_buffer_growth_step", SIZE_ACCEPTED, "512MiB";
    PD_BUFFER_DEVICE = "pd_buffer_device", "cpu, cuda or cuda:N (N from 0 to 1023)", "cpu";
    PD_PEER_HOST = "pd_peer_host", HOST, "127.0.0.1";
    PD_PEER_INIT_PORT = "pd_peer_init_port", PORTS, "7300";
    PD_PEER_ALLOC_PORT = "pd_peer_alloc_port", PORTS, "7400";
    PD_PEER_QUERY_PORT = "pd_peer_query_port", PORTS, "7600";
    PD_RECEIVERS = "pd_receivers",
        "a list of texts HOST:INIT_PORT:ALLOC_PORT, with ports from 1 to 65535, or one for each rank joined with +, and an IPv6 \
         address in brackets",
        "[10.0.0.2:7300:7400]";
    PD_PROXY_HOST = "pd_proxy_host", HOST, "127.0.0.1";
    PD_PROXY_PORT = "pd_proxy_port", "a port from 1 to 65535", "7500";
    PD_SKIP_PROXY_NOTIFICATION = "pd_skip_proxy_notification", BOOLEAN, "true";
    PD_ALLOCATION_TIMEOUT_SEC = "pd_allocation_timeout_sec", SECONDS, "30";
    PD_HANDSHAKE_TIMEOUT_SEC = "pd_handshake_timeout_sec", SECONDS, "10";
    PD_WRITE_TIMEOUT_SEC = "pd_write_timeout_sec", SECONDS, "120";
    PD_COMMIT_TIMEOUT_SEC = "pd_commit_timeout_sec", SECONDS, "10";
    PD_WAIT_TIMEOUT_SEC = "pd_wait_timeout_sec", SECONDS, "120";
    PD_RETENTION_SEC = "pd_retention_sec", SECONDS, "300";
    PD_SHUTDOWN_TIMEOUT_SEC = "pd_shutdown_timeout_sec", SECONDS, "5";
    PD_HEARTBEAT_INTERVAL_SEC = "pd_heartbeat_interval_sec", SECONDS, "1";
    PD_PEER_TIMEOUT_SEC = "pd_peer_timeout_sec", SECONDS, "5";
    PD_CONDITION_POLL_INTERVAL_SEC = "pd_condition_poll_interval_sec", SECONDS, "0.005";
    PD_MAX_PREFILL_LEN = "pd_max_prefill_len", "a number of tokens from 0 to 4294967295", "0";
    PD_BACKEND_MODE = "pd_backend_mode", "sync or async", "async";
    PD_BIDIRECTIONAL = "pd_bidirectional", BOOLEAN, "false";
    TRANSFER_CHANNEL = "transfer_channel", "nixl or local; left out: nixl where its library is found, else local",
        "nixl";
    NIXL_BACKENDS = "nixl_backends", "a list of 1 to 16 names of NIXL plugins", "[UCX]";
    PD_NIXL_LIB_DIR = "pd_nixl_lib_dir", "the folder of libnixl_capi.so", "/opt/nixl/lib";
    PD_CHECKSUM = "pd_checksum", "off, sampled or full", "sampled";
    PD_NIXL_PROGRESS_DELAY_US = "pd_nixl_progress_delay_us", "a number of microseconds from 0 to 1000000", "10000";
    PD_CONNECTOR_ENDPOINT = "pd_connector_endpoint",
        "ipc:// and an absolute path of at most 100 bytes, in which {role} and {rank} are filled in",
        "ipc:///run/user/1000/pd-{role}-{rank}.sock";
    PD_METRICS_HOST = "pd_metrics_host", HOST, "127.0.0.1";
    PD_METRICS_PORT = "pd_metrics_port",
        "none, a port from 0 to 65535, or a list of one such port per rank", "9400";
    PD_SHARED_SECRET_FILE = "pd_shared_secret_file",
        "the path of a file with 32 to 4096 bytes that others cannot read", "/etc/pd-backend/secret";
    PD_MAX_REQUESTS = "pd_max_requests", "a number from 1 to 1048576", "1024";
    PD_MAX_PEER_REQUESTS = "pd_max_peer_requests", "a number from 1 to 1048576", "512";
    PD_MAX_REQUEST_CHUNKS = "pd_max_request_chunks",
        "a number from 1 to 16384, as many keys as one message carries", "4096";
    PD_MAX_PEERS = "pd_max_peers", "a number from 1 to 4096, as many connections as one port keeps", "1024";
    PD_MAX_CLIENTS = "pd_max_clients", "a number from 1 to 1024", "16";
}

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
#[derive(Debug, PartialEq, Eq)]
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
        assert_eq!(classify("pd_role"), Known::Ours(&PD_ROLE));
        assert_eq!(classify("nixl_role"), Known::Older(&PD_ROLE));
        assert_eq!(classify("local_cpu"), Known::Lmcache);
        assert_eq!(classify("ec_chunk_size"), Known::Lmcache);
        assert_eq!(classify("pd_rol"), Known::Unknown);
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
