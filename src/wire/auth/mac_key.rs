//! A key for the codes of one direction, or of one proof.

use std::fmt;

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac as _};
use sha2::Sha256;

use super::message::{Channel, Mac};

/// What all keys are bound to. Another way of authenticating is another label.
const LABEL: &[u8] = b"pd-backend auth 1";

/// A key for one use, ready to hash. Boxed: it is two states of the hash, and moves about with every step.
pub(super) struct MacKey(Box<Hmac<Sha256>>);

impl MacKey {
    pub(super) fn new(prk: &Hkdf<Sha256>, channel: Channel, usage: &[u8]) -> Self {
        let mut key = [0; 32];
        prk.expand_multi_info(&[LABEL, b"\0", channel.as_str().as_bytes(), b"\0", usage], &mut key)
            .expect("HKDF gives up to 255 times the 32 bytes that are asked for");
        Self(Box::new(Hmac::new_from_slice(&key).expect("HMAC takes keys of any length")))
    }

    /// The code of these parts, one behind the other.
    pub(super) fn mac(&self, parts: &[&[u8]]) -> Mac {
        self.hash(parts).finalize().into_bytes().into()
    }

    /// Whether this is their code. Takes the same time wherever the first wrong byte is.
    pub(super) fn verify(&self, parts: &[&[u8]], mac: &[u8]) -> bool {
        self.hash(parts).verify_slice(mac).is_ok()
    }

    fn hash(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut hmac = Hmac::clone(&self.0);
        parts.iter().for_each(|part| hmac.update(part));
        hmac
    }
}

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey(..)")
    }
}
