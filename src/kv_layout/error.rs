//! What can be wrong with the description of a chunk.

/// Why a chunk's layout could not be made out. It does not name the file: who read it does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The text is not JSON, or not an object.
    #[error("not a JSON object: {reason}; {expected}")]
    NotJson {
        /// What the parser said.
        reason: String,
        /// What should be there.
        expected: &'static str,
    },
    /// A field that the layout cannot be computed without.
    #[error("field `{field}` is missing; expected {accepted}")]
    Missing {
        /// The field, with its other names.
        field: &'static str,
        /// Which values it may have.
        accepted: &'static str,
    },
    /// A field with a value that cannot be used.
    #[error("field `{field}` = {seen}; expected {accepted}")]
    BadField {
        /// Which field.
        field: String,
        /// Its value.
        seen: String,
        /// Which values it may have.
        accepted: String,
    },
    /// Text that would forge a log line, here or at a peer.
    #[error("{what} is {seen:?}; expected text without line breaks and other control characters; leave them out")]
    Unprintable {
        /// Which text.
        what: &'static str,
        /// The text.
        seen: String,
    },
    /// A field that a layout does not have.
    #[error("field `{field}` is not a field of a layout{}; the fields are {known}", suggestion(.nearest.as_deref()))]
    UnknownField {
        /// The field as written.
        field: String,
        /// The known field most like it.
        nearest: Option<String>,
        /// All of them.
        known: String,
    },
    /// Two fields that contradict each other.
    #[error("{first} contradicts {second}; {advice}")]
    Conflict {
        /// One, with its value.
        first: String,
        /// The other, with its value.
        second: String,
        /// What to do.
        advice: &'static str,
    },
    /// The model keeps something else than one KV cache of one shape in every layer.
    #[error(
        "field `{field}` = {seen}: {reason}, so its chunk does not follow from config.json; give the layout with --kv-layout"
    )]
    NotUniform {
        /// The field that says so.
        field: String,
        /// Its value.
        seen: String,
        /// What it means.
        reason: &'static str,
    },
    /// The heads cannot be split over the ranks.
    #[error(
        "{kv_heads} KV heads cannot be split over {tp_size} tensor-parallel ranks; expected --tp-size to divide {kv_heads}, or to be a multiple of it"
    )]
    NotDivisible {
        /// KV heads of the whole model.
        kv_heads: u64,
        /// Number of ranks.
        tp_size: u32,
    },
    /// The rank is not one of the ranks.
    #[error("rank {tp_rank} of {tp_size}; expected 0 to {}; give --tp-size as well as --rank", .tp_size.saturating_sub(1))]
    Rank {
        /// This rank.
        tp_rank: u32,
        /// Number of ranks.
        tp_size: u32,
    },
    /// A number outside what a layout may have.
    #[error("{what} = {seen}; expected {min} to {max}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// Its value.
        seen: u64,
        /// The smallest that is accepted.
        min: u64,
        /// The largest that is accepted.
        max: u64,
    },
}

/// `; did you mean x?`, or nothing.
pub(crate) fn suggestion(nearest: Option<&str>) -> String {
    nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default()
}
