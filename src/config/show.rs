//! A checked configuration as text: for `--check`, and as one line for the log.

use std::time::Duration;

use super::size::exact_size;
use super::{Config, Role, keys, receivers};
use crate::kv_layout::parse_dtype;

/// One key with its value, and what to know about it.
struct Line {
    /// Whether the key is set; one that is not is shown as a comment.
    set: bool,
    key: &'static str,
    value: String,
    remark: String,
}

impl Config {
    /// Every key that counts for this role with its value and unit, as YAML: given back as a configuration it
    /// means the same.
    pub fn to_yaml(&self) -> String {
        let layout = &self.layout;
        let mut text = format!("# pd-{}, rank {} of {}\n", self.role.as_str(), self.rank, layout.tp_size);
        for group in &layout.groups {
            let of_group = if group.name.is_empty() { String::new() } else { format!(" of group {}", group.name) };
            let chunk_bytes = group.partial_bytes(layout.chunk_tokens);
            text.push_str(&format!(
                "# one chunk{of_group}: {} tokens of {} bytes, {chunk_bytes} bytes in all ({})\n",
                layout.chunk_tokens,
                group.token_bytes(),
                exact_size(chunk_bytes),
            ));
            if group.is_opaque() {
                continue;
            }
            text.push_str(&format!(
                "# one token{of_group}: {} planes x {} layers x {} KV heads x {} elements of {} ({} bytes each)\n",
                group.kv_planes, group.layers, group.kv_heads, group.head_size, group.dtype, group.dtype_bytes,
            ));
        }
        text.push_str(&format!(
            "# pd_buffer: {} slots, {} bytes; {} bytes of pd_buffer_size left over\n",
            self.buffer.slot_count,
            self.buffer_len_bytes(),
            self.buffer.asked_bytes.saturating_sub(self.buffer_len_bytes()),
        ));
        for line in self.lines() {
            let comment = if line.set { "" } else { "# " };
            let remark = if line.remark.is_empty() { String::new() } else { format!("  # {}", line.remark) };
            text.push_str(&format!("{comment}{}: {}{remark}\n", line.key, line.value));
        }
        text
    }

    /// The same on one line, for the log at start.
    pub fn to_line(&self) -> String {
        let layout = &self.layout;
        let mut words = vec![
            format!("role={}", self.role.as_str()),
            format!("rank={}/{}", self.rank, layout.tp_size),
            format!("chunk_bytes={}", layout.chunk_bytes()),
            format!("slot_count={}", self.buffer.slot_count),
        ];
        words.extend(
            self.lines().into_iter().filter(|line| line.set).map(|line| format!("{}={}", line.key, line.value)),
        );
        words.join(" ")
    }

    fn lines(&self) -> Vec<Line> {
        let deadlines = &self.deadlines;
        let limits = &self.limits;
        let mut lines = vec![
            set(&keys::PD_ROLE, self.role.as_str(), ""),
            set(&keys::MODEL_NAME, quoted(&self.layout.model), "peers with another name are refused"),
            set(&keys::CHUNK_SIZE, self.layout.chunk_tokens, "tokens"),
            Line {
                set: parse_dtype(&self.layout.first_group().dtype).is_some(),
                ..set(&keys::KV_CACHE_DTYPE, &self.layout.first_group().dtype, "of the KV cache")
            },
            set(
                &keys::PD_BUFFER_SIZE,
                exact_size(self.buffer.asked_bytes),
                format!("{} bytes, a ceiling", self.buffer.asked_bytes),
            ),
            optional(
                &keys::PD_BUFFER_INITIAL_SIZE,
                self.buffer.is_lazy().then(|| exact_size(self.buffer_initial_bytes())),
                "all of it from the start",
            ),
            optional(
                &keys::PD_BUFFER_GROWTH_STEP,
                self.buffer.is_lazy().then(|| exact_size(self.buffer_step_bytes())),
                "all of it from the start",
            ),
            set(&keys::PD_BUFFER_DEVICE, self.buffer.device, ""),
            optional(
                &keys::TRANSFER_CHANNEL,
                self.engine.kind.map(super::EngineKind::as_str),
                "nixl where its library is found, else local",
            ),
            set(&keys::NIXL_BACKENDS, format!("[{}]", self.engine.nixl_backends.join(", ")), "in order of preference"),
            optional(
                &keys::PD_NIXL_LIB_DIR,
                self.engine.nixl_lib_dir.as_ref().map(|dir| quoted(&dir.display().to_string())),
                "NIXL_LIB_DIR, or where the system's loader looks",
            ),
            set(&keys::PD_CHECKSUM, self.engine.checksum.as_str(), "chunks checked on arrival"),
            set(&keys::PD_NIXL_PROGRESS_DELAY_US, self.engine.nixl_progress_delay_us, "microseconds"),
            optional(
                &keys::PD_SHARED_SECRET_FILE,
                self.shared_secret.as_ref().map(|secret| quoted(&secret.file.display().to_string())),
                "peers are not authenticated",
            ),
            optional(
                &keys::PD_CONNECTOR_ENDPOINT,
                self.connector_endpoint.as_deref().map(quoted),
                "a name of its own, in the ready line",
            ),
        ];
        match self.role {
            Role::Receiver => lines.extend([
                set(&keys::PD_PEER_HOST, quoted(&self.bind_host), "listened on"),
                set(&keys::PD_PEER_INIT_PORT, self.init_port, port_remark(self.init_port)),
                set(&keys::PD_PEER_ALLOC_PORT, self.alloc_port, port_remark(self.alloc_port)),
                optional(&keys::PD_PEER_QUERY_PORT, self.query_port, "cache queries are not served"),
            ]),
            Role::Sender => lines.extend([
                optional(&keys::PD_RECEIVERS, self.receivers_as_yaml(), "receivers are met at their first request"),
                optional(&keys::PD_PROXY_HOST, self.proxy.as_ref().map(|proxy| quoted(&proxy.host)), "nobody is told"),
                optional(&keys::PD_PROXY_PORT, self.proxy.as_ref().map(|proxy| proxy.port), "nobody is told"),
            ]),
        }
        lines.extend([
            seconds(&keys::PD_ALLOCATION_TIMEOUT_SEC, deadlines.allocation),
            seconds(&keys::PD_HANDSHAKE_TIMEOUT_SEC, deadlines.handshake),
            seconds(&keys::PD_WRITE_TIMEOUT_SEC, deadlines.write),
            seconds(&keys::PD_COMMIT_TIMEOUT_SEC, deadlines.commit),
            seconds(&keys::PD_WAIT_TIMEOUT_SEC, deadlines.wait),
            seconds(&keys::PD_RETENTION_SEC, deadlines.retention),
            seconds(&keys::PD_SHUTDOWN_TIMEOUT_SEC, deadlines.shutdown),
            optional(
                &keys::PD_METRICS_HOST,
                self.metrics.as_ref().map(|metrics| quoted(&metrics.host)),
                "metrics are not served",
            ),
            match &self.metrics {
                Some(metrics) => set(&keys::PD_METRICS_PORT, metrics.port, port_remark(metrics.port)),
                None => set(&keys::PD_METRICS_PORT, "none", "metrics are not served"),
            },
            seconds(&keys::PD_HEARTBEAT_INTERVAL_SEC, deadlines.heartbeat),
            seconds(&keys::PD_PEER_TIMEOUT_SEC, deadlines.peer),
            set(&keys::PD_MAX_REQUESTS, limits.requests_max, "that have not ended"),
            set(&keys::PD_MAX_PEER_REQUESTS, limits.peer_requests_max, "of one sender, at a receiver"),
            set(&keys::PD_MAX_REQUEST_CHUNKS, limits.request_chunks_max, "per request"),
            set(&keys::PD_MAX_PEERS, limits.peers_max, ""),
            set(&keys::PD_MAX_CLIENTS, limits.clients_max, ""),
        ]);
        lines
    }
}

impl Config {
    fn receivers_as_yaml(&self) -> Option<String> {
        let texts: Vec<String> = self.receivers.iter().map(|address| quoted(&receivers::text_of(address))).collect();
        (!texts.is_empty()).then(|| format!("[{}]", texts.join(", ")))
    }
}

fn set(key: &keys::Key, value: impl ToString, remark: impl Into<String>) -> Line {
    Line { set: true, key: key.name, value: value.to_string(), remark: remark.into() }
}

fn optional(key: &keys::Key, value: Option<impl ToString>, when_absent: &str) -> Line {
    match value {
        Some(value) => set(key, value, ""),
        None => Line { set: false, key: key.name, value: "null".to_owned(), remark: format!("not set: {when_absent}") },
    }
}

fn seconds(key: &keys::Key, duration: Duration) -> Line {
    set(key, duration.as_secs_f64(), "seconds")
}

fn port_remark(port: u16) -> &'static str {
    if port == 0 { "a free port, in the ready line" } else { "" }
}

/// Text that YAML reads back as it is: JSON's strings are YAML's double-quoted ones.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
