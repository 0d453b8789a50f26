//! A checked configuration as text: for `--check`, and as one line for the log.

use super::Config;
use super::key::{Absence, Key};
use super::keys::KEYS;
use super::size::exact_size;

impl Config {
    /// Every key that counts for this role with its value and unit, as YAML: given back as a configuration it
    /// means the same.
    pub fn to_yaml(&self) -> String {
        let layout = &self.layout;
        let mut text = format!("# {}, rank {} of {}\n", self.role.daemon(), self.rank, layout.tp_size);
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
        for (key, value) in self.rows() {
            let (comment, value, remark) = match (value, key.absence) {
                (Some(value), _) => ("", value, key.unit().to_owned()),
                (None, Absence::Without(_, then)) => ("# ", "null".to_owned(), format!("not set: {then}")),
                (None, _) => continue,
            };
            let remark = if remark.is_empty() { remark } else { format!("  # {remark}") };
            text.push_str(&format!("{comment}{}: {value}{remark}\n", key.name));
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
        words.extend(self.rows().filter_map(|(key, value)| Some(format!("{}={}", key.name, value?))));
        words.join(" ")
    }

    /// The keys that count for this role and can be shown, with their values.
    fn rows(&self) -> impl Iterator<Item = (&'static Key, Option<String>)> {
        let counts = KEYS.iter().filter(|key| key.used_by(self.role));
        counts.filter_map(|key| Some((*key, key.shown?(self))))
    }
}
