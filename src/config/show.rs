//! A checked configuration as text: for `--check`, and as one line for the log.

use std::time::Duration;

use super::size::exact_size;
use super::{Config, Role, keys};
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
        let mut text = format!(
            "# pd-{}, rank {} of {}\n# one chunk: {} tokens of {} bytes, {} bytes in all ({})\n# one token: {} planes x {} layers x {} KV heads x {} elements of {} ({} bytes each)\n# pd_buffer: {} slots, {} bytes; {} bytes of pd_buffer_size left over\n",
            self.role.as_str(),
            self.rank,
            layout.tp_size,
            layout.chunk_tokens,
            layout.token_bytes(),
            layout.chunk_bytes(),
            exact_size(layout.chunk_bytes()),
            layout.kv_planes,
            layout.layers,
            layout.kv_heads,
            layout.head_size,
            layout.dtype,
            layout.dtype_bytes,
            self.buffer.slot_count,
            self.buffer_len_bytes(),
            self.buffer.asked_bytes.saturating_sub(self.buffer_len_bytes()),
        );
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
                set: parse_dtype(&self.layout.dtype).is_some(),
                ..set(&keys::KV_CACHE_DTYPE, &self.layout.dtype, "of the KV cache")
            },
            set(
                &keys::PD_BUFFER_SIZE,
                exact_size(self.buffer.asked_bytes),
                format!("{} bytes, a ceiling", self.buffer.asked_bytes),
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
            set(&keys::PD_NIXL_PROGRESS_DELAY_US, self.engine.nixl_progress_delay_us, "microseconds"),
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
            set(&keys::PD_MAX_REQUESTS, limits.requests_max, "that have not ended"),
            set(&keys::PD_MAX_REQUEST_CHUNKS, limits.request_chunks_max, "per request"),
            set(&keys::PD_MAX_PEERS, limits.peers_max, ""),
            set(&keys::PD_MAX_CLIENTS, limits.clients_max, ""),
        ]);
        lines
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
