//! The connector API's messages, byte by byte, as the Python client has them as well.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use pd_backend::connector::message::{Reply, Request};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// One line of `python/tests/connector_messages.json`.
#[derive(Deserialize)]
struct Golden {
    name: String,
    from: String,
    message: serde_json::Value,
    msgpack: String,
}

#[test]
fn every_message_has_the_bytes_that_the_python_client_is_tested_with() {
    // Broken in production: a field is renamed here, and every engine's connector stops working.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tests/connector_messages.json");
    let all: Vec<Golden> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(all.len() >= 30, "only {} messages", all.len());
    for golden in &all {
        match golden.from.as_str() {
            "client" => check::<Request>(golden),
            _ => check::<Reply>(golden),
        }
    }
}

fn check<T: DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug>(golden: &Golden) {
    let Golden { name, message, msgpack, .. } = golden;
    let value: T = serde_json::from_value(message.clone()).unwrap();
    let bytes = rmp_serde::to_vec_named(&value).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(&hex, msgpack, "{name}");
    assert_eq!(rmp_serde::from_slice::<T>(&bytes).unwrap(), value, "{name}");
}
