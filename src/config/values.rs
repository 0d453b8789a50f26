//! Values of the right type and range, read out of what was written, or of what the key is when it is left out.

use std::time::Duration;

use super::address::is_host;
use super::error::ConfigError;
use super::key::{Absence, Key, Kind};
use super::notes::Notes;
use super::raw::{Entry, RawConfig, RawValue};
use super::size::parse_size;
use super::{DEADLINE_SEC_MAX, Role};
use crate::ids::is_printable;

/// Longest text of a [`Kind::Form`].
const FORM_LEN_BYTES_MAX: usize = 4096;

impl Entry {
    /// The refusal of this value for what the key accepts.
    pub(super) fn bad(&self, key: &Key) -> ConfigError {
        ConfigError::BadValue {
            origin: self.origin.clone(),
            key: self.written.clone(),
            seen: self.value.to_string(),
            accepted: key.accepted(),
            example: key.example(),
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

/// None: left out, and nothing stands for it.
type Read<T> = Result<Option<T>, ConfigError>;

impl RawConfig {
    fn read<T>(&self, key: &Key, read: impl FnOnce(&RawValue) -> Option<T>) -> Read<T> {
        match (self.entry(key), key.absence) {
            (Some(entry), _) => read(&entry.value).map(Some).ok_or_else(|| entry.bad(key)),
            (None, Absence::Is(value)) => Ok(RawValue::parse(value).ok().and_then(|value| read(&value))),
            (None, _) => Ok(None),
        }
    }

    /// A value that has to be there.
    pub(super) fn must<T>(&self, key: &Key, read: impl FnOnce(&Self, &Key) -> Read<T>) -> Result<T, ConfigError> {
        read(self, key)?.ok_or_else(|| missing(key))
    }

    /// The same, of a key that `role` may not use: it is checked all the same, and then counts as left out.
    pub(super) fn must_of<T>(
        &self,
        role: Role,
        key: &Key,
        mut read: impl FnMut(&Self, &Key) -> Read<T>,
    ) -> Result<T, ConfigError> {
        let value = self.must(key, &mut read)?;
        if key.used_by(role) { Ok(value) } else { Self::default().must(key, read) }
    }

    /// What was written for a key of which something must have been.
    pub(super) fn written(&self, key: &Key) -> Result<&Entry, ConfigError> {
        self.entry(key).ok_or_else(|| missing(key))
    }

    pub(super) fn boolean(&self, key: &Key) -> Read<bool> {
        self.read(key, |value| match value {
            RawValue::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// Text without control characters.
    pub(super) fn text(&self, key: &Key) -> Read<String> {
        let len_bytes_max = if let Kind::Text(max) = key.kind { max } else { FORM_LEN_BYTES_MAX };
        self.read(key, |value| match value {
            RawValue::Text(text) => printable(text, len_bytes_max).then(|| text.clone()),
            _ => None,
        })
    }

    /// One of the words that the key takes.
    pub(super) fn word(&self, key: &Key) -> Read<&'static str> {
        let words = if let Kind::Words(words) = key.kind { words } else { &[] };
        self.read(key, |value| match value {
            RawValue::Text(text) => words.iter().find(|word| *word == text).copied(),
            // YAML reads a bare `off` as a boolean.
            RawValue::Bool(false) => words.iter().find(|word| **word == "off").copied(),
            _ => None,
        })
    }

    pub(super) fn whole(&self, key: &Key) -> Read<u32> {
        let within = |n: &u32| matches!(key.kind, Kind::Whole { min, max, .. } if (min..=max).contains(n));
        self.read(key, |value| whole(value).and_then(|n| u32::try_from(n).ok()).filter(within))
    }

    pub(super) fn size(&self, key: &Key) -> Read<u64> {
        self.read(key, |value| match value {
            RawValue::Text(text) => parse_size(text),
            other => whole(other).and_then(|bytes| u64::try_from(bytes).ok()),
        })
    }

    /// A time; infinity becomes the longest there is, with a note.
    pub(super) fn seconds(&self, key: &Key, notes: &mut Notes) -> Read<Duration> {
        let max = Duration::from_secs(DEADLINE_SEC_MAX);
        self.read(key, |value| {
            let seconds = match value {
                RawValue::Integer(seconds) => *seconds as f64,
                RawValue::Float(seconds) => *seconds,
                // YAML's own word is `.inf`; what Python prints is `inf`.
                RawValue::Text(text) if text == "inf" => f64::INFINITY,
                _ => return None,
            };
            if seconds == f64::INFINITY {
                notes.say(format!(
                    "{} = {value} is taken as {DEADLINE_SEC_MAX} seconds: every wait here ends",
                    key.name
                ));
                return Some(max);
            }
            let min_ms = if let Kind::Seconds { min_ms } = key.kind { min_ms } else { 0 };
            Duration::try_from_secs_f64(seconds).ok().filter(|s| (Duration::from_millis(min_ms)..=max).contains(s))
        })
    }

    pub(super) fn host(&self, key: &Key) -> Read<String> {
        self.read(key, |value| match value {
            RawValue::Text(text) if is_host(text) => Some(text.clone()),
            _ => None,
        })
    }

    /// The ports of all ranks: one, or one each. LMCache takes `7300,7301` for a list as well.
    pub(super) fn ports(&self, key: &Key) -> Read<Vec<u16>> {
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
    pub(super) fn names(&self, key: &Key, count_max: usize) -> Read<Vec<String>> {
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

fn missing(key: &Key) -> ConfigError {
    ConfigError::Missing { key: key.name, accepted: key.accepted(), example: key.example() }
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
    !text.is_empty() && text.len() <= len_bytes_max && is_printable(text)
}
