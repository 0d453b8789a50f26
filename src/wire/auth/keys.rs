//! Keys of one connection, by HKDF-SHA256 from the secret and both nonces.

use hkdf::Hkdf;
use sha2::Sha256;

use super::mac_key::MacKey;
use super::message::{Channel, Mac, Nonce};
use super::sealed::{Opener, Sealer};
use crate::ids::SharedSecret;

/// All keys of one connection.
#[derive(Debug)]
pub(super) struct Keys {
    router_proves: MacKey,
    dealer_proves: MacKey,
    dealer_to_router: MacKey,
    router_to_dealer: MacKey,
}

impl Keys {
    pub(super) fn derive(secret: &SharedSecret, channel: Channel, hello: &Nonce, answer: &Nonce) -> Self {
        let prk = Hkdf::<Sha256>::new(Some(&[*hello, *answer].concat()), secret.expose());
        let key = |usage| MacKey::new(&prk, channel, usage);
        Self {
            router_proves: key(b"router proves"),
            dealer_proves: key(b"dealer proves"),
            dealer_to_router: key(b"dealer to router"),
            router_to_dealer: key(b"router to dealer"),
        }
    }

    /// The ROUTER's proof, over the hello as it came and the answer's nonce.
    pub(super) fn answer_mac(&self, hello: &[u8], nonce: &Nonce) -> Mac {
        self.router_proves.mac(&[&len(hello), hello, nonce])
    }

    pub(super) fn is_answer_mac(&self, hello: &[u8], nonce: &Nonce, mac: &Mac) -> bool {
        self.router_proves.verify(&[&len(hello), hello, nonce], mac)
    }

    /// The DEALER's proof, over both messages before it.
    pub(super) fn proof_mac(&self, hello: &[u8], answer: &[u8]) -> Mac {
        self.dealer_proves.mac(&[&len(hello), hello, answer])
    }

    pub(super) fn is_proof_mac(&self, hello: &[u8], answer: &[u8], mac: &Mac) -> bool {
        self.dealer_proves.verify(&[&len(hello), hello, answer], mac)
    }

    pub(super) fn dealer_ends(self) -> (Sealer, Opener) {
        (Sealer::new(self.dealer_to_router), Opener::new(self.router_to_dealer))
    }

    pub(super) fn router_ends(self) -> (Sealer, Opener) {
        (Sealer::new(self.router_to_dealer), Opener::new(self.dealer_to_router))
    }
}

/// So that no two pairs of a hello and what follows are the same bytes.
fn len(hello: &[u8]) -> [u8; 8] {
    (hello.len() as u64).to_be_bytes()
}
