//! What a daemon tells an operator's Prometheus: names, units, and how they are counted. No sockets, no clock.
//!
//! The node's notes, which become log lines, are counted here as well: [`Tally`] is their second reader. It holds
//! plain numbers and belongs to the driver alone, so counting takes no lock and a scrape can hold nobody up: a scrape
//! gets a copy, a [`Snapshot`], and [`exposition`] writes it as text on a thread that is nobody's.
//!
//! The text is written by `prometheus-client`, Prometheus's own library for Rust (0.25.2, released in 2026; its open
//! issues are about the plain Prometheus format, which is not used: OpenMetrics text is what Prometheus asks for first).
//! Its registry of shared counters is left alone: they are behind locks that a slow scrape would hold.
//!
//! | file | what is in it |
//! |---|---|
//! | `tally` | counters, fed by notes |
//! | `durations` | a histogram of times |
//! | `exposition` | every metric's name, type, unit and help, and the text |

mod durations;
mod exposition;
mod tally;

pub use exposition::{CONTENT_TYPE_OPEN_METRICS, CONTENT_TYPE_TEXT, exposition};
pub use tally::Tally;

use crate::connector::message::Status;
use crate::node::NodeCounts;

/// What a daemon has counted and what it has now, all of one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// As a client of the connector API sees it, so that the two can never disagree.
    pub status: Status,
    /// What the node has, by half.
    pub counts: NodeCounts,
    /// What happened since the daemon started.
    pub tally: Tally,
}

/// What the daemon's process uses, as the system counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessUsage {
    /// Processor time, user and system together, in seconds.
    pub cpu_s: f64,
    /// Resident memory, the pd_buffer's pages included, in bytes.
    pub resident_bytes: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// When it started, in seconds since 1970.
    pub start_time_s: f64,
}
