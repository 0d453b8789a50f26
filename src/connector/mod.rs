//! The connector API: what an engine's process says to the daemon beside it, over ipc.

pub mod client;
pub mod message;
mod ready_line;
pub mod server;

pub use client::{Client, ClientError};
pub use ready_line::{ReadyLine, StdoutLine};
pub use server::{ConnectorEvent, ConnectorServer};
