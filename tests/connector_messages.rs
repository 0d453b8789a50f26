//! The connector API's messages, byte by byte, as the Python client has them as well.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
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
    let (mut known, mut shown) = (BTreeSet::new(), BTreeSet::new());
    for golden in &all {
        let debug = match golden.from.as_str() {
            "client" => check::<Request>(golden),
            _ => check::<Reply>(golden),
        };
        // The file shows no field that is unknown here: its bytes would be others.
        let message = format!("{} {}", golden.from, golden.message["type"].as_str().unwrap());
        fields_known(&debug, &message, &mut known);
        fields_shown(&golden.message, &message, &mut shown);
    }
    let missing: Vec<_> = known.difference(&shown).collect();
    assert!(
        missing.is_empty(),
        "fields that no message of the file shows, and Python is not tested with: {missing:#?}"
    );
}

/// Where each field is that a value has, set or not. Of its pretty `Debug` text, which has a line and a deeper level for each.
fn fields_known(debug: &str, message: &str, known: &mut BTreeSet<String>) {
    let mut above: Vec<(usize, &str)> = Vec::new();
    for line in debug.lines() {
        let depth = line.len() - line.trim_start().len();
        above.retain(|(other, _)| *other < depth);
        let Some((name, _)) = line.trim_start().split_once(": ") else { continue };
        if name.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
            above.push((depth, name));
            let path: Vec<_> = above.iter().map(|(_, name)| *name).collect();
            known.insert(format!("{message}: {}", path.join(".")));
        }
    }
}

fn fields_shown(value: &serde_json::Value, path: &str, shown: &mut BTreeSet<String>) {
    let at = |name: &String| format!("{path}{}{name}", if path.contains(": ") { "." } else { ": " });
    for (name, value) in value.as_object().into_iter().flatten() {
        shown.insert(at(name));
        fields_shown(value, &at(name), shown);
    }
    value.as_array().into_iter().flatten().for_each(|item| fields_shown(item, path, shown));
}

fn check<T: DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug>(golden: &Golden) -> String {
    let Golden { name, message, msgpack, .. } = golden;
    let value: T = serde_json::from_value(message.clone()).unwrap();
    let bytes = rmp_serde::to_vec_named(&value).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(&hex, msgpack, "{name}");
    assert_eq!(rmp_serde::from_slice::<T>(&bytes).unwrap(), value, "{name}");
    format!("{value:#?}")
}
