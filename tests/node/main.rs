//! Each half alone, message by message. Many nodes together, in a seeded world: tests/simulation.

#![allow(clippy::unwrap_used)]

mod both;
mod incoming;
mod outgoing;
mod settings;
