//! Who may talk: the steps of an authentication as bytes and as values, and then over real sockets.

#![allow(clippy::unwrap_used)]

mod sockets;
mod wire;

use pd_backend::ids::SharedSecret;

fn secret(text: &str) -> SharedSecret {
    SharedSecret::new(format!("{text}, and enough bytes to be a secret").as_bytes()).unwrap()
}
