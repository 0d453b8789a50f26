//! Who may talk: mutual authentication of a connection by a shared secret, and a code on every later message.
//!
//! It happens once for each connection, below the node, which never sees a message that has not been authenticated,
//! and no message of theirs changes. Values alone: nonces are passed in, sockets and deadlines are the side channel's.
//!
//! ```text
//! DEALER (pd-sender)                                              ROUTER (a port of pd-receiver)
//!   PdAuthHello{version, channel, nonce}      ------------------>
//!                                             <------------------   PdAuthAnswer{nonce, mac}
//!   PdAuthProof{mac}                          ------------------>
//!   message | counter 0 | tag                 ------------------>
//!                                             <------------------   message | counter 0 | tag
//! ```
//!
//! Either side says `PdAuthRefused{reason}` instead of going on, also to a peer that does not authenticate at all, so
//! that a forgotten secret is an error message and not a timeout. A refusal is not authenticated, as it comes from
//! whoever has no key: it ends a connection, which whoever can forge it could do anyway.
//!
//! ```text
//! prk        = HKDF-Extract(salt = hello's nonce | answer's nonce, secret)
//! key of use = HKDF-Expand(prk, "pd-backend auth 1" 0 channel 0 use)
//!
//! use                 what for
//! "router proves"     answer's mac = HMAC(length of hello, 8 bytes | hello | answer's nonce)
//! "dealer proves"     proof's mac  = HMAC(length of hello, 8 bytes | hello | answer)
//! "dealer to router"  tag = HMAC(message | counter)
//! "router to dealer"  tag = HMAC(message | counter)
//! ```
//!
//! Every hash is SHA-256, every code has its full 32 bytes and is compared in constant time. The keys hold both nonces,
//! so nothing of one connection is good on another; the channel, so nothing of one port is good on another; and the
//! use, so nothing can be sent back to where it came from. The codes hold the bytes of the messages before them, so a
//! version cannot be talked down.

mod handshake;
mod keys;
mod mac_key;
mod message;
mod sealed;

pub use handshake::{
    DealerHandshake, HANDSHAKE_LEN_BYTES_MAX, Refused, RouterHandshake, RouterStep, refusal_of, refuse,
};
pub use message::{AUTH_VERSION, Channel, NONCE_LEN_BYTES, Nonce, Refusal, is_handshake};
pub use sealed::{Opener, SEAL_LEN_BYTES, Sealed, Sealer};

/// Why a peer is not, or no longer, talked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// The peer does not authenticate, and this side insists.
    #[error("it does not authenticate, and this side has a pd_shared_secret_file; give both the same file, or neither")]
    Unauthenticated,
    /// The peer authenticates, and this side has nothing to do so with.
    #[error("it authenticates, and this side has no pd_shared_secret_file; give both the same file, or neither")]
    NoSecretHere,
    /// The peer's proof is not one of somebody who has our secret.
    #[error("its secret is another one; give both the same pd_shared_secret_file")]
    SecretDiffers,
    /// The peer meant another port.
    #[error(
        "it means the {seen} port, and this is the {expected} port; look for ports that were swapped in its request"
    )]
    WrongChannel {
        /// What it wants to talk about.
        seen: Channel,
        /// What is talked about here.
        expected: Channel,
    },
    /// The peer authenticates in a way that we do not know.
    #[error(
        "it authenticates by version {seen}, this side by version {AUTH_VERSION}; run the same release at both ends"
    )]
    Version {
        /// Its version.
        seen: u16,
    },
    /// The peer has said why it does not talk to us.
    #[error("it refuses this side: {0}")]
    ByPeer(Refusal),
    /// What came is no step of an authentication.
    #[error("what it sent is no step of an authentication")]
    Malformed,
    /// A message's code does not fit the message, or the connection.
    #[error("a message was altered on its way, or comes from somebody without the secret")]
    Altered,
    /// A message that has been taken already.
    #[error("message {counter} came again; {expected} was next")]
    Replayed {
        /// Its number.
        counter: u64,
        /// The number that would have been right.
        expected: u64,
    },
    /// Messages before this one have not come.
    #[error("message {counter} came; {expected} was next and has gone missing")]
    Missing {
        /// Its number.
        counter: u64,
        /// The number that would have been right.
        expected: u64,
    },
    /// Shorter than its code.
    #[error("a message of {len_bytes} bytes, shorter than the {SEAL_LEN_BYTES} of its seal")]
    Truncated {
        /// Its length.
        len_bytes: usize,
    },
}

impl AuthError {
    /// What the peer is told about it, if it can do anything about it.
    const fn refusal(&self) -> Option<Refusal> {
        Some(match self {
            Self::Unauthenticated => Refusal::SecretWanted,
            Self::NoSecretHere => Refusal::NoSecret,
            Self::SecretDiffers => Refusal::SecretDiffers,
            Self::WrongChannel { .. } => Refusal::WrongChannel,
            Self::Version { .. } => Refusal::Version,
            Self::Malformed => Refusal::Malformed,
            _ => return None,
        })
    }
}
