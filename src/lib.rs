//! Prefill/decode KV-cache transport for disaggregated LLM serving: the library behind `pd-sender`, `pd-receiver` and
//! `pd-bench`.
//!
//! A prefill worker fills slots of its pd-sender's buffer; the transfer engine writes them, one-sided, into the buffer
//! of a pd-receiver; a decode worker reads them there. ZeroMQ carries handshakes, allocations and commits.
//!
//! Modules, and who may name whom (left may name right, never back; `tests/layers.rs` enforces it):
//!
//! ```text
//! bin -> cli -> runtime, bench
//!
//!        runtime -> node         -> slot -> address
//!              |                 '-> wire -> ids
//!              |-> connector    -> side_channel -> wire
//!              |-> metrics      -> node, connector
//!              |-> transfer     -> buffer -> address
//!              '-> config       -> kv_layout
//!        bench   -> connector, side_channel, buffer, config
//! ```
//!
//! Where to begin reading:
//!
//! - what a request goes through: [`node`], a state machine of one or two halves that never waits and never looks at a clock;
//! - what happens in which order in a daemon: `runtime::driver`, then `runtime::daemon`;
//! - what travels: [`wire::message`] between daemons, [`connector::message`] between an engine and its daemon;
//! - how bytes move: [`transfer::TransferEngine`] and its two engines;
//! - memory of a GPU: `buffer::cuda`, over `buffer::cuda::driver` alone; what waits for an engine's stream:
//!   `runtime::awaiting_event`;
//! - which chunk is where: [`slot::SlotTable`]; which bytes are taken: [`address::AddressManager`]; how the memory under
//!   them grows: [`buffer::MemoryManager`];
//! - what is different with LMCache's own peers: `node::incoming::dialect` and `node::outgoing::dialect`;
//! - who may talk: [`wire::auth`]; what an operator sees: [`metrics`];
//! - what a daemon can be told: [`config::Config`].
//!
//! What a vLLM server does with all of it is `python/pd_backend/vllm`, whose `__init__.py` is the map there.
//!
//! One request, end to end, is `python/tests/test_end_to_end.py`; the same of two nodes without sockets is `tests/node/both.rs`, and of two
//! processes in Rust [`mod@bench`], which drives the daemons from outside. docs/architecture.md names the function at each step of a chunk's
//! way and of a cancel's.

pub mod address;
pub mod bench;
pub mod buffer;
pub mod cli;
pub mod config;
pub mod connector;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod ids;
pub mod kv_layout;
pub mod metrics;
pub mod node;

pub mod runtime;
pub mod side_channel;
pub mod slot;
pub mod transfer;
pub mod wire;
