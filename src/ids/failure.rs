//! Why a request ended badly: one vocabulary for the wire, the connector API, the logs and the metrics.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::truncate::truncate;

/// What went wrong, as somebody who has to act on it would sort it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The message was well formed but asks for something that makes no sense.
    BadRequest,
    /// No request, slot or lease of that name belongs to whoever asked.
    Unknown,
    /// A configured or built-in limit was exceeded.
    Limit,
    /// A limit leaves no place for one more at the moment: whoever asks again later may get one.
    Busy,
    /// The request needs more slots than the buffer has.
    TooLarge,
    /// No slots became free before the deadline.
    NoSlots,
    /// A deadline other than the one for slots passed.
    Deadline,
    /// Somebody cancelled it.
    Cancelled,
    /// Nobody fetched it within the retention time.
    Expired,
    /// The peer could not be reached.
    PeerUnreachable,
    /// The peer was there and is gone.
    PeerLost,
    /// The peer refused to talk to us, or we to it.
    HandshakeRefused,
    /// The two sides do not mean the same thing by a chunk.
    LayoutMismatch,
    /// The engine could not move the bytes.
    TransferFailed,
    /// Bytes that arrived are not those that were sent.
    Corrupted,
    /// This daemon is going down.
    ShuttingDown,
    /// Our own mistake.
    Internal,
    /// A kind that a newer peer knows and we do not.
    #[serde(other)]
    Other,
}

impl FailureKind {
    /// The name on the wire, in logs and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unknown => "unknown",
            Self::Limit => "limit",
            Self::Busy => "busy",
            Self::TooLarge => "too_large",
            Self::NoSlots => "no_slots",
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::PeerUnreachable => "peer_unreachable",
            Self::PeerLost => "peer_lost",
            Self::HandshakeRefused => "handshake_refused",
            Self::LayoutMismatch => "layout_mismatch",
            Self::TransferFailed => "transfer_failed",
            Self::Corrupted => "corrupted",
            Self::ShuttingDown => "shutting_down",
            Self::Internal => "internal",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a request failed: what kind, and what was seen, expected and can be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{kind}: {text}")]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people.
    #[serde(deserialize_with = "truncated")]
    pub text: String,
}

impl Failure {
    /// A failure of this kind. The text may quote a peer or a client, and is [truncated](truncate) as theirs is.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self { kind, text: truncate(&text.into()) }
    }
}

/// A peer's words, made fit for an answer and a log line.
fn truncated<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| truncate(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_cannot_forge_a_line_wherever_its_text_is_from() {
        // Broken in production: a peer's refusal, or ours that quotes the peer, writes an alarm of its own into the log.
        let forged = "bad dtype x\nERROR forged \u{1b}[2K";
        let ours = Failure::new(FailureKind::LayoutMismatch, forged);
        let theirs: Failure = serde_json::from_value(serde_json::json!({"kind": "limit", "text": forged})).unwrap();
        for text in [ours.text, theirs.text] {
            assert_eq!(text, "bad dtype x\u{fffd}ERROR forged \u{fffd}[2K");
        }
        assert!(Failure::new(FailureKind::Limit, "7, ".repeat(16_384)).text.len() < 1000);
    }
}
