//! Each session alone, message by message. Both together, under a seeded world: tests/simulation.

#![allow(clippy::unwrap_used)]

mod receiver;
mod sender;
