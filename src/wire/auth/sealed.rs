//! Messages of an authenticated connection: `message | counter, 8 bytes, big-endian | tag, 32 bytes`.
//!
//! The counter starts at 0 in either direction and grows by one with each message, so a message that comes twice, out of
//! its turn, or after one that has gone missing is noticed. What surrounds a message stands behind it, so that opening
//! one copies nothing.

use super::AuthError;
use super::mac_key::MacKey;

const COUNTER_LEN_BYTES: usize = 8;
const TAG_LEN_BYTES: usize = 32;

/// What authentication adds to every message, in bytes.
pub const SEAL_LEN_BYTES: usize = COUNTER_LEN_BYTES + TAG_LEN_BYTES;

/// The sending end of one direction.
#[derive(Debug)]
pub struct Sealer {
    key: MacKey,
    counter: u64,
}

/// A message that is fit to be sent. Say so with [`Sealer::sent`] when it has been, or the next one has its number.
#[must_use = "send it and tell the sealer, or drop it"]
#[derive(Debug)]
pub struct Sealed(pub Vec<u8>);

impl Sealer {
    pub(super) const fn new(key: MacKey) -> Self {
        Self { key, counter: 0 }
    }

    /// Seals a message as the next one. If it cannot be sent after all, the next one takes its place.
    pub fn seal(&self, mut message: Vec<u8>) -> Sealed {
        message.reserve_exact(SEAL_LEN_BYTES);
        message.extend_from_slice(&self.counter.to_be_bytes());
        let tag = self.key.mac(&[&message]);
        message.extend_from_slice(&tag);
        Sealed(message)
    }

    /// What was sealed last is on its way.
    pub const fn sent(&mut self) {
        self.counter += 1;
    }
}

/// The receiving end of one direction.
#[derive(Debug)]
pub struct Opener {
    key: MacKey,
    counter: u64,
}

impl Opener {
    pub(super) const fn new(key: MacKey) -> Self {
        Self { key, counter: 0 }
    }

    /// The length in bytes of the message at the front of what came.
    ///
    /// # Errors
    /// [`AuthError::Truncated`], [`AuthError::Altered`], [`AuthError::Replayed`] or [`AuthError::Missing`]: nothing that
    /// comes through this connection is to be believed any more.
    pub fn open(&mut self, sealed: &[u8]) -> Result<usize, AuthError> {
        let truncated = AuthError::Truncated { len_bytes: sealed.len() };
        let Some((numbered, tag)) = sealed.split_last_chunk::<TAG_LEN_BYTES>() else { return Err(truncated) };
        let Some((message, counter)) = numbered.split_last_chunk::<COUNTER_LEN_BYTES>() else { return Err(truncated) };
        if !self.key.verify(&[numbered], tag) {
            return Err(AuthError::Altered);
        }
        // Only a number that is genuine is worth talking about.
        let (counter, expected) = (u64::from_be_bytes(*counter), self.counter);
        match counter.cmp(&expected) {
            std::cmp::Ordering::Less => Err(AuthError::Replayed { counter, expected }),
            std::cmp::Ordering::Greater => Err(AuthError::Missing { counter, expected }),
            std::cmp::Ordering::Equal => {
                self.counter += 1;
                Ok(message.len())
            }
        }
    }
}
