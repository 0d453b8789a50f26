//! The two ends of an authentication, as values.

use super::AuthError;
use super::keys::Keys;
use super::message::{AUTH_VERSION, AuthMessage, Channel, Nonce, Refusal, is_handshake};
use super::sealed::{Opener, Sealer};
use crate::ids::SharedSecret;
use crate::wire::codec::{decode, encode};

/// Longest step of an authentication, in bytes: ours have some 110, the rest is room for newer peers' fields.
pub const HANDSHAKE_LEN_BYTES_MAX: usize = 1024;

/// An authentication that has come to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why, for our own log.
    pub error: AuthError,
    /// What to send before the connection is closed, if the peer does not know it yet.
    pub close_reason: Option<Vec<u8>>,
}

impl From<AuthError> for Refused {
    fn from(error: AuthError) -> Self {
        let close_reason = error.refusal().map(|reason| encode(&AuthMessage::Refused { reason }));
        Self { error, close_reason }
    }
}

/// Turns a peer away from a port where nobody authenticates: it began to, so it has a secret and we have none.
pub fn refuse() -> Refused {
    AuthError::NoSecretHere.into()
}

/// The refusal in a payload, if it is one: what a side that does not authenticate hears from one that does.
pub fn refusal_of(payload: &[u8]) -> Option<Refusal> {
    match read(payload) {
        Ok(AuthMessage::Refused { reason }) => Some(reason),
        _ => None,
    }
}

/// The connecting end, waiting for an answer to its hello.
#[derive(Debug)]
pub struct DealerHandshake {
    secret: SharedSecret,
    channel: Channel,
    nonce: Nonce,
    hello: Vec<u8>,
}

impl DealerHandshake {
    /// Begins. `nonce` must be random and has never been used before.
    pub fn new(secret: &SharedSecret, channel: Channel, nonce: Nonce) -> Self {
        let hello = encode(&AuthMessage::Hello { version: AUTH_VERSION, channel, nonce });
        Self { secret: secret.clone(), channel, nonce, hello }
    }

    /// What to send first.
    pub fn hello(&self) -> &[u8] {
        &self.hello
    }

    /// The peer has answered: what to send back, and both directions from then on.
    ///
    /// # Errors
    /// [`Refused`] when the peer does not have the secret, or does not want us. Close the connection.
    pub fn handle_answer(self, answer: &[u8]) -> Result<(Vec<u8>, Sealer, Opener), Refused> {
        let (nonce, mac) = match read(answer)? {
            AuthMessage::Answer { nonce, mac } => (nonce, mac),
            AuthMessage::Refused { reason } => return Err(AuthError::ByPeer(reason).into()),
            _ => return Err(AuthError::Malformed.into()),
        };
        let keys = Keys::derive(&self.secret, self.channel, &self.nonce, &nonce);
        if !keys.is_answer_mac(&self.hello, &nonce, &mac) {
            return Err(AuthError::SecretDiffers.into());
        }
        let proof = encode(&AuthMessage::Proof { mac: keys.proof_mac(&self.hello, answer) });
        let (sealer, opener) = keys.dealer_ends();
        Ok((proof, sealer, opener))
    }
}

/// The end that is connected to.
#[derive(Debug)]
pub struct RouterHandshake {
    secret: SharedSecret,
    channel: Channel,
    nonce: Nonce,
    answered: Option<Answered>,
}

#[derive(Debug)]
struct Answered {
    keys: Keys,
    hello: Vec<u8>,
    answer: Vec<u8>,
}

/// How an authentication goes on at the end that is connected to.
#[derive(Debug)]
pub enum RouterStep {
    /// Send this; more follows.
    Answer(RouterHandshake, Vec<u8>),
    /// The peer has the secret: both directions from now on.
    Done(Sealer, Opener),
}

impl RouterHandshake {
    /// Waits for a hello. `nonce` must be random and has never been used before.
    pub const fn new(secret: SharedSecret, channel: Channel, nonce: Nonce) -> Self {
        Self { secret, channel, nonce, answered: None }
    }

    /// The peer has said something.
    ///
    /// # Errors
    /// [`Refused`] when it does not have the secret, does not authenticate, or means another port. Close the connection.
    pub fn handle(self, payload: &[u8]) -> Result<RouterStep, Refused> {
        let message = match read(payload) {
            Ok(AuthMessage::Refused { reason }) => return Err(AuthError::ByPeer(reason).into()),
            Ok(message) => message,
            // Whatever else is said first is said by somebody who does not know of secrets.
            Err(_) if self.answered.is_none() && !is_handshake(payload) => {
                return Err(AuthError::Unauthenticated.into());
            }
            Err(error) => return Err(error.into()),
        };
        match (self.answered, message) {
            (None, AuthMessage::Hello { version, .. }) if version != AUTH_VERSION => {
                Err(AuthError::Version { seen: version }.into())
            }
            (None, AuthMessage::Hello { channel, .. }) if channel != self.channel => {
                Err(AuthError::WrongChannel { seen: channel, expected: self.channel }.into())
            }
            (None, AuthMessage::Hello { nonce, .. }) => {
                let keys = Keys::derive(&self.secret, self.channel, &nonce, &self.nonce);
                let mac = keys.answer_mac(payload, &self.nonce);
                let answer = encode(&AuthMessage::Answer { nonce: self.nonce, mac });
                let answered = Answered { keys, hello: payload.to_vec(), answer: answer.clone() };
                Ok(RouterStep::Answer(Self { answered: Some(answered), ..self }, answer))
            }
            (Some(Answered { keys, hello, answer }), AuthMessage::Proof { mac }) => {
                if !keys.is_proof_mac(&hello, &answer, &mac) {
                    return Err(AuthError::SecretDiffers.into());
                }
                let (sealer, opener) = keys.router_ends();
                Ok(RouterStep::Done(sealer, opener))
            }
            _ => Err(AuthError::Malformed.into()),
        }
    }
}

fn read(payload: &[u8]) -> Result<AuthMessage, AuthError> {
    if payload.len() > HANDSHAKE_LEN_BYTES_MAX {
        return Err(AuthError::Malformed);
    }
    decode(payload).map_err(|_| AuthError::Malformed)
}
