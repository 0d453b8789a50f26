//! What becomes of a question for parked chunks.

use serde::{Deserialize, Serialize};

/// Most names that one request may be known by.
pub const REQUEST_IDS_MAX: usize = 16;

/// What became of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Registration {
    /// At least one chunk is there or being computed: it is kept, or the allocation follows.
    Accepted,
    /// Nothing of it is known yet; there will be news.
    Pending,
    /// Nothing of it is known: it was never computed there, or its lease has ended.
    Unknown,
    /// It was accepted, or pending, and comes to nothing; or it is refused.
    Failed,
    /// It is given up, as was asked.
    Released,
}

impl Registration {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Accepted, Self::Pending, Self::Unknown, Self::Failed, Self::Released];

    /// The name on the wire and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Pending => "pending",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
            Self::Released => "released",
        }
    }
}
