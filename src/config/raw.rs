//! A configuration as written: keys with values of any type and where each came from, before anything is believed.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::{NonFiniteFloatPolicy, Spanned};

use super::error::ConfigError;
use super::key::Key;
use super::keys::PD_BUFFER_DEVICE;
use super::names::{Known, NIXL_BUFFER_DEVICE, classify, nearest};

/// Most items of a list that are kept: no key takes more.
const LIST_LEN_MAX: usize = 65_536;

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RawValue {
    /// `null`, or nothing after the colon.
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<RawValue>),
    /// No key of ours takes one, so what is in it is not kept.
    Map,
}

impl RawValue {
    /// A value as it is written.
    ///
    /// # Errors
    /// What the parser says.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        serde_saphyr::from_str_with_options(text, yaml_options()).map_err(|error| one_line(&error.to_string()))
    }
}

impl fmt::Display for RawValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_MAX: usize = 80;
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) if value.is_infinite() => f.write_str(if *value > 0.0 { ".inf" } else { "-.inf" }),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(text) => match text.char_indices().nth(SHOWN_MAX) {
                Some((end, _)) => write!(f, "{:?}...", &text[..end]),
                None => write!(f, "{text:?}"),
            },
            Self::List(items) => {
                f.write_str("[")?;
                for (index, item) in items.iter().take(8).enumerate() {
                    write!(f, "{}{item}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str(if items.len() > 8 { ", ...]" } else { "]" })
            }
            Self::Map => f.write_str("a map"),
        }
    }
}

impl<'de> Deserialize<'de> for RawValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = RawValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<RawValue, E> {
                Ok(RawValue::Null)
            }

            fn visit_none<E>(self) -> Result<RawValue, E> {
                Ok(RawValue::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawValue, D::Error> {
                RawValue::deserialize(deserializer)
            }

            fn visit_bool<E>(self, value: bool) -> Result<RawValue, E> {
                Ok(RawValue::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<RawValue, E> {
                Ok(RawValue::Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<RawValue, E> {
                Ok(RawValue::Integer(value.into()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<RawValue, E> {
                Ok(RawValue::Integer(value))
            }

            fn visit_u128<E>(self, value: u128) -> Result<RawValue, E> {
                Ok(i128::try_from(value).map_or(RawValue::Float(f64::INFINITY), RawValue::Integer))
            }

            fn visit_f64<E>(self, value: f64) -> Result<RawValue, E> {
                Ok(RawValue::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<RawValue, E> {
                Ok(RawValue::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<RawValue, E> {
                Ok(RawValue::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawValue, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    if items.len() == LIST_LEN_MAX {
                        return Err(serde::de::Error::custom(format!("a list of more than {LIST_LEN_MAX} items")));
                    }
                    items.push(item);
                }
                Ok(RawValue::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawValue, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(RawValue::Map)
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

/// A file's pairs in the order written.
struct Document(Vec<(Spanned<String>, RawValue)>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("lines of the form `key: value`")
            }

            fn visit_unit<E>(self) -> Result<Document, E> {
                Ok(Document(Vec::new()))
            }

            fn visit_none<E>(self) -> Result<Document, E> {
                Ok(Document(Vec::new()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Document(pairs))
            }
        }

        deserializer.deserialize_any(Pairs)
    }
}

fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        // `.inf` is how LMCache's own default of pd_allocation_timeout_sec is written.
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

/// A value with the name under which, and the place where, it was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub value: RawValue,
    pub written: String,
    pub origin: String,
}

/// All that was written, by today's names; what is not for us is set aside.
#[derive(Debug, Default, PartialEq)]
pub(super) struct RawConfig {
    entries: BTreeMap<&'static str, Entry>,
    /// Older names that were used, in alphabetical order.
    pub older_names: Vec<String>,
    /// LMCache's other keys, in the order written.
    pub lmcache_keys: Vec<String>,
}

impl RawConfig {
    /// Reads a file's text and the values of `--set`, which take precedence, the later over the earlier.
    pub(super) fn parse(file: Option<(&str, &str)>, assignments: &[String]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some((file, text)) = file {
            config.add_file(file, text)?;
        }
        for assignment in assignments {
            config.set(assignment)?;
        }
        Ok(config)
    }

    /// What was written for a key; null is nothing.
    pub(super) fn entry(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key.name)
    }

    fn add_file(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        let mut older: Vec<(&'static Key, Entry)> = Vec::new();
        let mut nixl_device = None;
        for (name, value) in parse_document(file, text)? {
            let entry = Entry { value, written: name.value, origin: format!("{file}:{}", name.referenced.line()) };
            match classify(&entry.written) {
                _ if entry.written == NIXL_BUFFER_DEVICE => nixl_device = Some(entry),
                Known::Ours(key) => self.insert(key, entry),
                Known::Older(key) => older.push((key, entry)),
                Known::Lmcache => self.lmcache_keys.push(entry.written),
                Known::Unknown => return Err(unknown(entry.origin, entry.written)),
            }
        }
        // After all of today's names, so that the order in the file does not matter.
        for (key, entry) in older {
            match self.entries.get(key.name) {
                Some(present) if present.value != entry.value && entry.value != RawValue::Null => {
                    return Err(ConfigError::OlderName {
                        origin: entry.origin,
                        older_key: entry.written,
                        older_seen: entry.value.to_string(),
                        key: key.name,
                        seen: present.value.to_string(),
                    });
                }
                Some(_) => {}
                None => {
                    self.older_names.push(format!("{} (now {})", entry.written, key.name));
                    self.insert(key, entry);
                }
            }
        }
        if let Some(entry) = nixl_device {
            if self.entries.contains_key(PD_BUFFER_DEVICE.name) {
                self.lmcache_keys.push(entry.written);
            } else {
                self.older_names.push(format!("{} (now {})", entry.written, PD_BUFFER_DEVICE.name));
                self.insert(&PD_BUFFER_DEVICE, entry);
            }
        }
        self.older_names.sort();
        Ok(())
    }

    fn set(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let Some((name, text)) = assignment.split_once('=') else {
            return Err(ConfigError::NotAssignment { seen: assignment.to_owned() });
        };
        let name = name.trim();
        let origin = "--set".to_owned();
        let value = if text.trim().is_empty() {
            RawValue::Null
        } else {
            match RawValue::parse(text) {
                // `::` and `a: b` are maps to YAML, and no key takes a map: they are meant as they stand.
                Ok(RawValue::Map) if !text.trim_start().starts_with('{') => RawValue::Text(text.trim().to_owned()),
                Ok(value) => value,
                Err(reason) => {
                    let origin = format!("--set {assignment}");
                    let reason = format!("{reason}; a text with such characters has to be in quotes: {name}='\"...\"'");
                    return Err(ConfigError::NotYaml { origin, reason });
                }
            }
        };
        let entry = Entry { value, written: name.to_owned(), origin: origin.clone() };
        match classify(name) {
            _ if name == NIXL_BUFFER_DEVICE => self.insert(&PD_BUFFER_DEVICE, entry),
            Known::Ours(key) | Known::Older(key) => self.insert(key, entry),
            Known::Lmcache => self.lmcache_keys.push(entry.written),
            Known::Unknown => return Err(unknown(origin, entry.written)),
        }
        Ok(())
    }

    /// LMCache writes null for what is not set, and `--set key=` takes back what a file says.
    fn insert(&mut self, key: &Key, entry: Entry) {
        if entry.value == RawValue::Null {
            self.entries.remove(key.name);
        } else {
            self.entries.insert(key.name, entry);
        }
    }
}

fn unknown(origin: String, key: String) -> ConfigError {
    let nearest = nearest(&key);
    ConfigError::UnknownKey { origin, key, nearest }
}

fn parse_document(file: &str, text: &str) -> Result<Vec<(Spanned<String>, RawValue)>, ConfigError> {
    let empty = text.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#')
    });
    if empty {
        return Ok(Vec::new());
    }
    serde_saphyr::from_str_with_options::<Document>(text, yaml_options()).map(|document| document.0).map_err(|error| {
        let line = error.location().map(|location| format!(":{}", location.line())).unwrap_or_default();
        let origin = format!("{file}{line}");
        match error.without_snippet() {
            serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
                ConfigError::Duplicate { origin, key: key.clone() }
            }
            other => ConfigError::NotYaml { origin, reason: one_line(&other.to_string()) },
        }
    })
}

/// The first line of a parser's message, so that an error stays one line of a log.
fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::keys::{ENABLE_PD, PD_ALLOCATION_TIMEOUT_SEC, PD_BUFFER_SIZE, PD_PEER_INIT_PORT, PD_ROLE};
    use super::*;

    fn parse(text: &str, set: &[&str]) -> Result<RawConfig, String> {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        RawConfig::parse(Some(("f.yaml", text)), &set).map_err(|error| error.to_string())
    }

    #[test]
    fn values_keep_their_type_and_their_line() {
        // Broken in production: an error points at the wrong line, or 7300 and "7300" are the same.
        let raw = parse("# c\nenable_pd: yes\n\npd_peer_init_port:\n  - 7300\n  - \"7301\"\npd_allocation_timeout_sec: .inf\npd_buffer_size: 4GiB\n", &[])
            .unwrap();
        assert_eq!(raw.entry(&ENABLE_PD).unwrap().value, RawValue::Bool(true));
        let ports = raw.entry(&PD_PEER_INIT_PORT).unwrap();
        assert_eq!(ports.origin, "f.yaml:4");
        assert_eq!(ports.value.to_string(), "[7300, \"7301\"]");
        assert_eq!(raw.entry(&PD_ALLOCATION_TIMEOUT_SEC).unwrap().value, RawValue::Float(f64::INFINITY));
        assert_eq!(raw.entry(&PD_BUFFER_SIZE).unwrap().value, RawValue::Text("4GiB".to_owned()));
    }

    #[test]
    fn null_and_nothing_are_not_set() {
        // Broken in production: a file with LMCache's `key: null` is refused.
        for text in ["", "# only a comment\n", "---\n", "pd_role: null\n", "pd_role:\n", "pd_role: ~\n"] {
            assert_eq!(parse(text, &[]).unwrap().entry(&PD_ROLE), None, "{text:?}");
        }
    }

    #[test]
    fn set_takes_precedence_whatever_name_the_file_uses() {
        // Broken in production: a connector cannot override what an older file says.
        let raw =
            parse("nixl_buffer_size: 1000\n", &["pd_buffer_size=2GiB", "pd_role=sender", "pd_role = both"]).unwrap();
        assert_eq!(raw.entry(&PD_BUFFER_SIZE).unwrap().value, RawValue::Text("2GiB".to_owned()));
        assert_eq!(raw.entry(&PD_ROLE).unwrap().value, RawValue::Text("both".to_owned()));
        let raw = parse("pd_role: sender\n", &["pd_role=", "pd_peer_init_port=[1, 2]", "local_cpu=true"]).unwrap();
        assert_eq!(raw.entry(&PD_ROLE), None);
        assert_eq!(raw.entry(&PD_PEER_INIT_PORT).unwrap().value.to_string(), "[1, 2]");
        assert_eq!(raw.lmcache_keys, ["local_cpu"]);
    }

    #[test]
    fn an_address_of_ipv6_is_set_as_it_stands() {
        // Broken in production: `--set pd_peer_host=::` is refused as a map, by an error that says nothing of quotes.
        for host in ["::", "::1", "fe80::1", "\"::\""] {
            let raw = parse("", &[&format!("pd_peer_host={host}")]).unwrap();
            let written = raw.entry(&super::super::keys::PD_PEER_HOST).unwrap();
            assert_eq!(written.value, RawValue::Text(host.trim_matches('"').to_owned()), "{host}");
        }
        let map = parse("", &["pd_peer_host={a: 1}"]).unwrap();
        assert_eq!(map.entry(&super::super::keys::PD_PEER_HOST).unwrap().value, RawValue::Map);
        let error = parse("", &["pd_peer_host=*"]).unwrap_err();
        assert!(error.contains("has to be in quotes: pd_peer_host='\"...\"'"), "{error}");
    }

    #[test]
    fn older_names_mean_todays() {
        // Broken in production: files of earlier LMCache versions are refused, or half of them is ignored.
        let raw = parse("nixl_role: sender\nnixl_buffer_device: cuda\npd_buffer_size: 5\nnixl_buffer_size: 5\n", &[])
            .unwrap();
        assert_eq!(raw.entry(&PD_ROLE).unwrap().written, "nixl_role");
        assert_eq!(raw.entry(&PD_BUFFER_DEVICE).unwrap().value, RawValue::Text("cuda".to_owned()));
        assert_eq!(raw.older_names, ["nixl_buffer_device (now pd_buffer_device)", "nixl_role (now pd_role)"]);
        let both = parse("nixl_buffer_device: cuda\npd_buffer_device: cpu\n", &[]).unwrap();
        assert_eq!(both.entry(&PD_BUFFER_DEVICE).unwrap().value, RawValue::Text("cpu".to_owned()));
        assert_eq!(both.lmcache_keys, ["nixl_buffer_device"]);
    }

    #[test]
    fn maps_of_lmcache_are_passed_over() {
        // Broken in production: an lmcache.yaml with extra_config cannot be shared.
        let raw = parse("extra_config:\n  a: {b: [1, 2]}\n  c: 1\nlocal_cpu: false\nec_role: x\n", &[]).unwrap();
        assert_eq!(raw.lmcache_keys, ["extra_config", "local_cpu", "ec_role"]);
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_place() {
        // Broken in production: an operator searches a long file for one wrong line.
        for (text, set, error) in [
            (
                "pd_role: sender\npd_bufer_size: 1\n",
                vec![],
                "f.yaml:2: `pd_bufer_size` is not a known key; did you mean `pd_buffer_size`?; configs/sender.yaml and configs/receiver.yaml list all keys",
            ),
            (
                "colour: red\n",
                vec![],
                "f.yaml:1: `colour` is not a known key; configs/sender.yaml and configs/receiver.yaml list all keys",
            ),
            ("pd_role: sender\n\npd_role: sender\n", vec![], "f.yaml:3: `pd_role` is there twice; keep one of them"),
            (
                "nixl_role: sender\npd_role: both\n",
                vec![],
                "f.yaml:1: nixl_role = \"sender\" contradicts pd_role = \"both\"; the first is an older name of the second, keep `pd_role` alone",
            ),
            ("", vec!["pd_role"], "--set pd_role: expected key=value, for example --set pd_buffer_size=4GiB"),
            (
                "",
                vec!["pd_roll=sender"],
                "--set: `pd_roll` is not a known key; did you mean `pd_role`?; configs/sender.yaml and configs/receiver.yaml list all keys",
            ),
        ] {
            assert_eq!(parse(text, &set).unwrap_err(), error);
        }
        for text in
            ["- a\n- b\n", "just text\n", "pd_role: [sender\n", "a: b: c\n", "a: 1\n---\nb: 2\n", "a: &x [*x]\n"]
        {
            let error = parse(text, &[]).unwrap_err();
            assert!(error.starts_with("f.yaml") && error.contains("not YAML that can be read"), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = parse("", &["pd_role=[x"]).unwrap_err();
        assert!(error.starts_with("--set pd_role=[x: not YAML that can be read: "), "{error}");
    }
}
