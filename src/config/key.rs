//! What is said about a key of the configuration: which values it takes, and what it is when it is left out.

use super::size::SIZE_ACCEPTED;
use super::{Config, DEADLINE_SEC_MAX, Role};

/// One of our keys: a row of the table in `keys`.
#[derive(Debug)]
pub(super) struct Key {
    /// As it is written.
    pub name: &'static str,
    /// Which values it takes.
    pub kind: Kind,
    /// What it is when it is left out.
    pub absence: Absence,
    /// Which halves use it; one that does not accepts and ignores it.
    pub of: Role,
    /// Its value in a checked configuration, as YAML; none when it is not set.
    pub shown: Option<fn(&Config) -> Option<String>>,
    /// The heading that it stands under in the shipped files.
    #[cfg(test)]
    pub section: &'static str,
    /// What it is for.
    #[cfg(test)]
    pub help: &'static [&'static str],
}

/// Which values a key takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Boolean,
    /// One of these.
    Words(&'static [&'static str]),
    /// Text of 1 to so many bytes.
    Text(usize),
    /// Text or a list that `resolve` looks into, in words.
    Form(&'static str),
    Whole {
        /// Its unit; empty for a plain number.
        of: &'static str,
        min: u32,
        max: u32,
    },
    /// Bytes.
    Size,
    /// Seconds with a fraction, at least so many milliseconds.
    Seconds {
        min_ms: u64,
    },
    Host,
    /// One port that is not 0.
    Port,
    /// The ports of all ranks.
    Ports,
    /// The same, or the word `none`.
    PortsOrNone,
}

/// What a key is when it is left out.
#[derive(Debug, Clone, Copy)]
pub(super) enum Absence {
    /// This value.
    Is(&'static str),
    /// Nothing; an example of a value, and what happens then.
    Without(&'static str, &'static str),
    /// Refused, by the daemons that use it; an example of a value.
    Refused(&'static str),
}

impl Key {
    /// Whether a daemon with these halves uses it.
    pub(super) const fn used_by(&self, role: Role) -> bool {
        (self.of.sends() && role.sends()) || (self.of.receives() && role.receives())
    }

    /// A value that it takes, as YAML.
    pub(super) const fn example(&self) -> &'static str {
        match self.absence {
            Absence::Is(value) | Absence::Without(value, _) | Absence::Refused(value) => value,
        }
    }

    /// The unit of its value; empty where it has none.
    pub(super) const fn unit(&self) -> &'static str {
        match self.kind {
            Kind::Whole { of, .. } => of,
            Kind::Seconds { .. } => "seconds",
            _ => "",
        }
    }

    /// Which values it takes, in words.
    pub(super) fn accepted(&self) -> String {
        const PORTS: &str = "a port from 0 to 65535, or a list of one such port per rank";
        match self.kind {
            Kind::Boolean => "true or false".to_owned(),
            Kind::Words([words @ .., last]) => format!("{} or {last}", words.join(", ")),
            Kind::Words([]) => String::new(),
            Kind::Text(len_bytes_max) => format!("text of 1 to {len_bytes_max} bytes"),
            Kind::Form(form) => form.to_owned(),
            Kind::Whole { of: "", min, max } => format!("a number from {min} to {max}"),
            Kind::Whole { of, min, max } => format!("a number of {of} from {min} to {max}"),
            Kind::Size => SIZE_ACCEPTED.to_owned(),
            Kind::Seconds { min_ms } => {
                format!("a number of seconds from {} to {DEADLINE_SEC_MAX}", min_ms as f64 / 1000.0)
            }
            Kind::Host => "a host name or an address, without scheme and port".to_owned(),
            Kind::Port => "a port from 1 to 65535".to_owned(),
            Kind::Ports => PORTS.to_owned(),
            Kind::PortsOrNone => format!("none, {PORTS}"),
        }
    }
}

/// Text that YAML reads back as it is: JSON's strings are YAML's double-quoted ones.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
