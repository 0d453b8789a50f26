//! What a pd-sender and a pd-receiver say to each other, to their connectors and to their engines, as state machines.
//!
//! Sans-IO: `handle_*` takes news in and never waits, `poll_output` gives work out, `poll_timeout` says when to call
//! `handle_timeout` next. Time is an argument, so a test or a simulation owns the clock. A peer's message is never
//! asserted on: it is refused. Every request ends exactly once, and every wait has a deadline.
//!
//! ```text
//! connector          SenderSession                    ReceiverSession          connector
//!   open -------------->|-- NixlInitRequest ---------------->|
//!                       |<----------------- NixlInitResponse-|
//!                       |-- NixlMemRegRequest -------------->|      (first request to this receiver only)
//!                       |<--------------- NixlMemRegResponse-|
//!                       |-- AllocRequest ------------------->|
//!   <-- opened ---------|<-------------------- AllocResponse-|<------------- wait
//!   stage, send ------->|== engine writes the chunks =======>|
//!                       |-- PdCommit ----------------------->|
//!   <-- sent -----------|<---------------------- PdCommitAck-|-- ready ------------->
//!                       |-- ProxyNotif --> proxy             |<-- release -----------
//! ```

mod handshake;
pub mod receiver;
pub mod sender;
mod timers;

pub use receiver::ReceiverSession;
pub use sender::SenderSession;

/// Which of a receiver's ports a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// Handshakes.
    Init,
    /// Allocations, commits and cancels.
    Alloc,
    /// Cache queries.
    Query,
}

/// What a chunk is, as far as the sessions need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkShape {
    /// Bytes of a whole chunk, and from one slot to the next.
    pub chunk_bytes: u64,
    /// Bytes of one token.
    pub token_bytes: u64,
    /// Tokens in a whole chunk.
    pub chunk_tokens: u32,
    /// LMCache's number of the memory format.
    pub wire_format: i64,
    /// Shape of a whole chunk on LMCache's wire.
    pub wire_shape: Vec<u64>,
    /// Element type as torch calls it.
    pub dtype: String,
}

impl ChunkShape {
    /// Bytes of chunk `index` of `count`, the last of which has `last_tokens` tokens.
    fn len_bytes(&self, index: usize, count: usize, last_tokens: u32) -> u64 {
        if index + 1 == count { self.token_bytes * u64::from(last_tokens) } else { self.chunk_bytes }
    }
}
