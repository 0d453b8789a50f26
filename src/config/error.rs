//! What can be wrong with what a daemon was told.

use crate::kv_layout::{LayoutError, suggestion};

/// A configuration that cannot be used: the daemon ends with exit code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("cannot read {what} {file}: {reason}")]
    Unreadable {
        /// Which kind of file.
        what: &'static str,
        /// Its path as given.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// A file, or the value of a `--set`, that is not YAML.
    #[error("{origin}: not YAML that can be read: {reason}; expected lines of the form `key: value`")]
    NotYaml {
        /// File and line, or option.
        origin: String,
        /// What the parser said.
        reason: String,
    },
    /// An option of another form.
    #[error("--set {seen}: expected key=value, for example --set pd_buffer_size=4GiB")]
    NotAssignment {
        /// What was given.
        seen: String,
    },
    /// A key that neither we nor LMCache know.
    #[error("{origin}: `{key}` is not a known key{}; configs/sender.yaml and configs/receiver.yaml list all keys", suggestion(.nearest.as_deref()))]
    UnknownKey {
        /// File and line, or option.
        origin: String,
        /// The key as written.
        key: String,
        /// The known key most like it.
        nearest: Option<String>,
    },
    /// One key twice in a file.
    #[error("{origin}: `{key}` is there twice; keep one of them")]
    Duplicate {
        /// File and line.
        origin: String,
        /// The key as written.
        key: String,
    },
    /// Two names of one key, with different values.
    #[error(
        "{origin}: {older_key} = {older_seen} contradicts {key} = {seen}; the first is an older name of the second, keep `{key}` alone"
    )]
    OlderName {
        /// File and line of the older name.
        origin: String,
        /// The older name.
        older_key: String,
        /// Its value.
        older_seen: String,
        /// Today's name.
        key: &'static str,
        /// Its value.
        seen: String,
    },
    /// A key that must be there.
    #[error("`{key}` is missing; expected {accepted}; write for example `{key}: {example}`")]
    Missing {
        /// Which key.
        key: &'static str,
        /// Which values it may have.
        accepted: String,
        /// One of them.
        example: &'static str,
    },
    /// A value that cannot be used.
    #[error("{origin}: {key} = {seen}; expected {accepted}; write for example `{key}: {example}`")]
    BadValue {
        /// File and line, or option.
        origin: String,
        /// The key as written.
        key: String,
        /// Its value.
        seen: String,
        /// Which values it may have.
        accepted: String,
        /// One of them.
        example: &'static str,
    },
    /// A value that is understood and cannot be served.
    #[error("{origin}: {key} = {seen}: {reason}; {advice}")]
    Refused {
        /// File and line, or option.
        origin: String,
        /// The key as written.
        key: String,
        /// Its value.
        seen: String,
        /// Why not.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// Neither a model nor a layout was given.
    #[error(
        "no chunk layout: give --model config.json (as model hubs keep it beside the weights) or --kv-layout layout.json"
    )]
    NoLayout,
    /// The model or layout cannot be used.
    #[error("{file}: {source}")]
    Layout {
        /// Path as given.
        file: String,
        /// What is wrong with it.
        source: LayoutError,
    },
}
