//! What is said before a connection is authenticated: msgpack maps with a `type`, as everything on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The way of authenticating that this build knows.
pub const AUTH_VERSION: u16 = 1;

/// Bytes of a [`Nonce`].
pub const NONCE_LEN_BYTES: usize = 32;

/// Random bytes that are used once.
pub type Nonce = [u8; NONCE_LEN_BYTES];

/// A message authentication code.
pub(super) type Mac = [u8; 32];

/// What a connection is for: which of a daemon's ports it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Handshakes.
    Init,
    /// Allocations, commits and cancels.
    Alloc,
    /// Cache queries.
    Query,
    /// Registrations for parked chunks.
    Rendezvous,
}

impl Channel {
    /// The name on the wire, in keys and in log lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Alloc => "alloc",
            Self::Query => "query",
            Self::Rendezvous => "rendezvous",
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why somebody is not talked to, as they are told. `Display` is what it means to whoever is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Refusal {
    /// Whoever refuses wants authentication, and there was none.
    SecretWanted,
    /// Whoever refuses has no secret.
    NoSecret,
    /// The secrets are not the same.
    SecretDiffers,
    /// The connection was made to another port than was meant.
    WrongChannel,
    /// Another way of authenticating.
    Version,
    /// Not to be understood.
    Malformed,
    /// A reason that a newer peer knows and we do not.
    #[serde(other)]
    Other,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SecretWanted => {
                "it has a pd_shared_secret_file and this side has none; give both the same file, or neither"
            }
            Self::NoSecret => {
                "it has no pd_shared_secret_file and this side has one; give both the same file, or neither"
            }
            Self::SecretDiffers => "the two sides have different secrets; give both the same pd_shared_secret_file",
            Self::WrongChannel => "this is another of its ports; look for ports that were swapped in the request",
            Self::Version => "it authenticates in another way; run the same release at both ends",
            Self::Malformed => "it did not understand how this side authenticates; run the same release at both ends",
            Self::Other => "for a reason that this version does not know; run the same release at both ends",
        })
    }
}

/// The steps of an authentication.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(super) enum AuthMessage {
    /// DEALER to ROUTER: let us see who we are.
    #[serde(rename = "PdAuthHello")]
    Hello {
        version: u16,
        channel: Channel,
        #[serde(with = "serde_bytes")]
        nonce: Nonce,
    },
    /// ROUTER to DEALER: I have the secret.
    #[serde(rename = "PdAuthAnswer")]
    Answer {
        #[serde(with = "serde_bytes")]
        nonce: Nonce,
        #[serde(with = "serde_bytes")]
        mac: Mac,
    },
    /// DEALER to ROUTER: so have I.
    #[serde(rename = "PdAuthProof")]
    Proof {
        #[serde(with = "serde_bytes")]
        mac: Mac,
    },
    /// Either way: no.
    #[serde(rename = "PdAuthRefused")]
    Refused { reason: Refusal },
}

/// Whether a payload is a step of an authentication, by its first bytes. Whoever does not authenticate asks this of every
/// message, so it costs next to nothing.
pub fn is_handshake(payload: &[u8]) -> bool {
    // A map of a few fields, of which the first is `type` with a text of less than 32 bytes: as every peer writes it.
    matches!(payload, [0x80..=0x8f, b'\xa4', b't', b'y', b'p', b'e', 0xa0..=0xbf, name @ ..] if name.starts_with(b"PdAuth"))
}
