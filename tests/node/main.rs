//! Each half alone, message by message. Many nodes together, in a seeded world: tests/simulation.

#![allow(clippy::unwrap_used)]

mod both;
mod incoming;
mod outgoing;

use pd_backend::wire::message::{CAPABILITY_COMMIT, CAPABILITY_HEARTBEAT, Hello};

/// How one of ours introduces itself.
fn hello(instance: &str) -> Hello {
    Hello {
        version_min: 2,
        version_max: 2,
        instance: instance.into(),
        engine: "test".into(),
        layout: Vec::new(),
        capabilities: vec![CAPABILITY_COMMIT.into(), CAPABILITY_HEARTBEAT.into()],
        process: None,
    }
}
