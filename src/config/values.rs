//! Values of the right type and range, read out of what was written.

use std::net::Ipv6Addr;
use std::time::Duration;

use super::DEADLINE_SEC_MAX;
use super::error::ConfigError;
use super::keys::Key;
use super::raw::{Entry, RawConfig, RawValue};
use super::size::parse_size;

impl Entry {
    /// The refusal of this value for what the key accepts.
    pub(super) fn bad(&self, key: &Key) -> ConfigError {
        self.bad_because(key, key.accepted.to_owned())
    }

    pub(super) fn bad_because(&self, key: &Key, accepted: String) -> ConfigError {
        ConfigError::BadValue {
            origin: self.origin.clone(),
            key: self.written.clone(),
            seen: self.value.to_string(),
            accepted,
            example: key.example,
        }
    }

    /// The refusal of a value that is well formed.
    pub(super) fn refused(&self, reason: impl Into<String>, advice: impl Into<String>) -> ConfigError {
        ConfigError::Refused {
            origin: self.origin.clone(),
            key: self.written.clone(),
            seen: self.value.to_string(),
            reason: reason.into(),
            advice: advice.into(),
        }
    }
}

impl RawConfig {
    fn read<T>(&self, key: &Key, read: impl FnOnce(&RawValue) -> Option<T>) -> Result<Option<T>, ConfigError> {
        self.entry(key).map(|entry| read(&entry.value).ok_or_else(|| entry.bad(key))).transpose()
    }

    pub(super) fn boolean(&self, key: &Key) -> Result<Option<bool>, ConfigError> {
        self.read(key, |value| match value {
            RawValue::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// Text of 1 to `len_bytes_max` bytes without control characters.
    pub(super) fn text(&self, key: &Key, len_bytes_max: usize) -> Result<Option<String>, ConfigError> {
        self.read(key, |value| match value {
            RawValue::Text(text) => printable(text, len_bytes_max).then(|| text.clone()),
            _ => None,
        })
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, key: &Key, choices: &[(&str, T)]) -> Result<Option<T>, ConfigError> {
        self.read(key, |value| match value {
            RawValue::Text(text) => choices.iter().find(|(name, _)| name == text).map(|(_, choice)| *choice),
            // YAML reads a bare `off` as a boolean.
            RawValue::Bool(false) => choices.iter().find(|(name, _)| *name == "off").map(|(_, choice)| *choice),
            _ => None,
        })
    }

    pub(super) fn whole(&self, key: &Key, min: u32, max: u32) -> Result<Option<u32>, ConfigError> {
        self.read(key, |value| whole(value).and_then(|n| u32::try_from(n).ok()).filter(|n| (min..=max).contains(n)))
    }

    pub(super) fn size(&self, key: &Key) -> Result<Option<u64>, ConfigError> {
        self.read(key, |value| match value {
            RawValue::Text(text) => parse_size(text),
            other => whole(other).and_then(|bytes| u64::try_from(bytes).ok()),
        })
    }

    /// A time of at least `min`; infinity becomes the longest there is, with a note.
    pub(super) fn seconds(
        &self,
        key: &Key,
        min: Duration,
        default: Duration,
        notes: &mut Vec<String>,
    ) -> Result<Duration, ConfigError> {
        let Some(entry) = self.entry(key) else {
            return Ok(default);
        };
        let max = Duration::from_secs(DEADLINE_SEC_MAX);
        let bad = || {
            let min_sec = min.as_secs_f64();
            entry.bad_because(key, format!("a number of seconds from {min_sec} to {DEADLINE_SEC_MAX}"))
        };
        let seconds = match &entry.value {
            RawValue::Integer(seconds) => *seconds as f64,
            RawValue::Float(seconds) => *seconds,
            // YAML's own word is `.inf`; what Python prints is `inf`.
            RawValue::Text(text) if text == "inf" => f64::INFINITY,
            _ => return Err(bad()),
        };
        if seconds == f64::INFINITY {
            notes.push(format!(
                "{} = {} is taken as {DEADLINE_SEC_MAX} seconds: every wait here ends",
                key.name, entry.value
            ));
            return Ok(max);
        }
        match Duration::try_from_secs_f64(seconds) {
            Ok(duration) if (min..=max).contains(&duration) => Ok(duration),
            _ => Err(bad()),
        }
    }

    pub(super) fn host(&self, key: &Key) -> Result<Option<String>, ConfigError> {
        self.read(key, |value| match value {
            RawValue::Text(text) if is_host(text) => Some(text.clone()),
            _ => None,
        })
    }

    /// The ports of all ranks: one, or one each. LMCache takes `7300,7301` for a list as well.
    pub(super) fn ports(&self, key: &Key) -> Result<Option<Vec<u16>>, ConfigError> {
        let port = |value: &RawValue| whole(value).and_then(|port| u16::try_from(port).ok());
        self.read(key, |value| match value {
            RawValue::List(items) if !items.is_empty() => items.iter().map(port).collect(),
            RawValue::Text(text) if text.contains(',') => {
                text.split(',').map(|port| port.trim().parse().ok()).collect()
            }
            other => port(other).map(|port| vec![port]),
        })
    }

    /// Names, as a list or a single one.
    pub(super) fn names(&self, key: &Key, count_max: usize) -> Result<Option<Vec<String>>, ConfigError> {
        let name = |value: &RawValue| match value {
            RawValue::Text(text) => {
                let word = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
                (word && printable(text, 64)).then(|| text.clone())
            }
            _ => None,
        };
        self.read(key, |value| match value {
            RawValue::List(items) if (1..=count_max).contains(&items.len()) => items.iter().map(name).collect(),
            other => name(other).map(|name| vec![name]),
        })
    }
}

/// A whole number, also where YAML's number has a fraction of 0 or an exponent.
fn whole(value: &RawValue) -> Option<i128> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    match value {
        RawValue::Integer(number) => Some(*number),
        RawValue::Float(number) if number.fract() == 0.0 && number.abs() <= EXACT_MAX => Some(*number as i128),
        _ => None,
    }
}

fn printable(text: &str, len_bytes_max: usize) -> bool {
    !text.is_empty() && text.len() <= len_bytes_max && !text.chars().any(char::is_control)
}

/// A name or an address; not a URL, not `host:port`.
pub(super) fn is_host(text: &str) -> bool {
    const NAME_LEN_BYTES_MAX: usize = 253;
    let name = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    printable(text, NAME_LEN_BYTES_MAX) && (name || text.parse::<Ipv6Addr>().is_ok())
}
