//! What a daemon says to its peers, to its connectors and to its transfer engine, as a state machine: a [`Node`] of one or two halves.
//!
//! Sans-IO: `handle_*` takes events in and never waits, `poll_output` gives work out, `poll_timeout` says when to call
//! `handle_timeout` next. Time is an argument, so a test or a simulation owns the clock. A peer's message is never
//! asserted on: it is refused, or ignored with a note. Every request ends exactly once, and every wait has a deadline.
//!
//! | file | what is in it |
//! |---|---|
//! | `session` | [`Node`] itself: passes each event to its half, and offers freed slots to the other half |
//! | `core` | what the halves share: slots, deadlines, growth, outputs |
//! | `outgoing` | the half that sends: open, stage, send, commit |
//! | `incoming` | the half that receives: grant, take a commit, lease |
//! | `settings`, `output`, `answer` | what a node is told at start, asks of the world, answers its clients |
//! | `handshake`, `heard`, `tries` | whether two daemons may talk; for how long a peer has been silent; when an address is tried again |
//! | `chunks`, `growth`, `timers` | how long a chunk is; when the buffer grows; deadlines by name |
//! | `safeguards` | what a mutant of the simulation can switch off; production never does |
//! | `seen`, `latest` | numbers that were seen; a memory of so many things and no more |
//!
//! ```text
//! connector            outgoing                          incoming              connector
//!   open -------------->|-- NixlInitRequest ---------------->|
//!                       |<----------------- NixlInitResponse-|
//!                       |-- NixlMemRegRequest -------------->|      (once for each receiver: at start, or with the first request)
//!                       |<--------------- NixlMemRegResponse-|
//!                       |-- AllocRequest ------------------->|
//!   <-- opened ---------|<-------------------- AllocResponse-|<------------- wait
//!   stage, send ------->|== engine writes the chunks =======>|
//!                       |-- PdCommit ----------------------->|
//!   <-- sent -----------|<---------------------- PdCommitAck-|-- ready ------------->
//!                       |-- ProxyNotif --> proxy             |<-- release -----------
//! ```
//!
//! `handle_*` takes an event of the world, `on_*` a message of a peer. How a cancel goes is in docs/architecture.md.
//!
//! Messages may be lost, repeated, reordered and late: a message counts for what it names (an instance, a grant, the
//! number of an allocation), a repeated one changes nothing (a repeated commit is answered like the first), and what must arrive (a commit, the acknowledgement
//! that a writer has stopped) is retransmitted until it is answered. A connected sender pings; a side that hears nothing for
//! `peer_timeout` gives the other up.

mod answer;
mod chunks;
mod core;
mod growth;
mod handshake;
mod heard;
mod latest;
#[cfg(feature = "lmcache")]
mod lmcache_terms;
// Without LMCache nothing makes the variants that stand for it.
#[cfg_attr(not(feature = "lmcache"), allow(dead_code))]
pub mod incoming;
#[cfg_attr(not(feature = "lmcache"), allow(dead_code))]
pub mod outgoing;
mod output;
mod safeguards;
mod seen;
mod session;
mod settings;
mod timers;
mod tries;

pub use answer::Answer;
pub use chunks::ChunkShape;
pub use growth::Grown;
pub use output::{Note, Output, PeerMemory, Remote, To};
#[cfg(feature = "mutants")]
#[doc(hidden)]
pub use safeguards::Safeguard;
pub use session::{Node, NodeCounts};
pub use settings::{IncomingSettings, NodeSettings, OutgoingSettings};

/// Most processes that a receiver asks one sender about at a time.
const PROCESSES_ASKED_MAX: usize = 64;

/// Which of a receiver's ports a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// Handshakes.
    Init,
    /// Allocations, commits and cancels.
    Alloc,
    /// Cache queries.
    Query,
    /// Registrations for parked chunks: of the half that sends, where the others are of the half that receives.
    Rendezvous,
}

impl Port {
    /// For an error text.
    pub(crate) const fn purpose(self) -> &'static str {
        match self {
            Self::Init => "handshakes (pd_peer_init_port)",
            Self::Alloc => "allocations (pd_peer_alloc_port)",
            Self::Query => "cache queries (pd_peer_query_port)",
            Self::Rendezvous => "registrations (pd_rendezvous_port)",
        }
    }

    /// What it takes of senders of another make, or of receivers, for an error text.
    pub(crate) const fn accepted(self) -> &'static str {
        match self {
            Self::Init => "NixlInitRequest and NixlMemRegRequest",
            Self::Alloc => "AllocRequest and CancelNotif",
            Self::Query => "CacheQueryRequest",
            Self::Rendezvous => "PdRegister and PdRelease",
        }
    }
}
