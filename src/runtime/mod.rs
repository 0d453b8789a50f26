//! The daemons: the only place with tasks, threads, a clock and signals.
//!
//! One driver task per daemon owns the node and everything that must be done in order. Around it: one task for
//! each bound port and one for the sockets to each receiver or source, one thread for the transfer engine, one watcher for each signal, parent and peer process. They talk to
//! the driver through two queues, a bounded one for sockets and one for everything else, so the node sees one event
//! after the other.
//!
//! | file | what is in it |
//! |---|---|
//! | `driver` | the loop around a node: events, deadlines, draining |
//! | `daemon` | which event goes where, which output does what |
//! | `setup`, `identity`, `ready` | before the loop: memory, engine, who we are, the ready line |
//! | `engine_thread`, `engine_server`, `engine_work`, `probe` | the thread that owns the transfer engine, its loop, what it is told and tells, and whether it is at work |
//! | `awaiting_event`, `deferred`, `summing`, `sum_queue` | what waits there for a GPU, or for checksums |
//! | `ports`, `peer_links`, `message_budget`, `proxy` | our ports, our connections to receivers, what waits of what they hear, the way to the router |
//! | `clients`, `translate` | the connector API: who is attached, and its words for the node's words |
//! | `lifecycle`, `process`, `watches`, `witness` | signals, the parent, the ends of peers' processes |
//! | `notes`, `error` | log lines, and why a daemon could not go on |
//! | `http`, `health`, `usage` | metrics and health: the server, how it asks the driver, what the process uses |

mod awaiting_event;
mod clients;
mod daemon;
mod deferred;
mod driver;
mod engine_server;
mod engine_thread;
mod engine_work;
mod error;
#[cfg(test)]
mod flood;
mod health;
mod http;
mod identity;
mod lifecycle;
mod message_budget;
mod notes;
mod peer_links;
#[cfg(test)]
mod played_engine;
mod ports;
mod probe;
mod process;
mod proxy;
mod ready;
mod setup;
mod sum_queue;
mod summing;
mod translate;
mod usage;
mod watches;
mod witness;

pub use error::RuntimeError;

/// Lets every source of events speak to a driver in its own type.
macro_rules! event_sources {
    ($event:ident: $($variant:ident($source:ty)),+ $(,)?) => {
        $(impl From<$source> for $event {
            fn from(source: $source) -> Self {
                Self::$variant(source)
            }
        })+
    };
}
use event_sources;

use crate::config::Config;

/// What a daemon is told besides its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// End when the process that started us ends.
    pub exit_with_parent: bool,
}

/// Looks whether the machine has what a configuration asks of it, as far as that can be seen without taking it.
///
/// # Errors
/// What [`run`] would say.
pub fn check_machine(config: &Config) -> Result<(), RuntimeError> {
    setup::check_machine(config)
}

/// Runs a daemon until it is told to stop. Blocks.
///
/// # Errors
/// [`RuntimeError`], whose [`exit_code`](RuntimeError::exit_code) is the process's.
pub fn run(config: Config, options: RunOptions) -> Result<(), RuntimeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RuntimeError::Machine(format!("the async runtime cannot start: {source}")))?;
    let result = runtime.block_on(daemon::run(config, options));
    // Socket tasks may still be flushing: they are not waited for without end.
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    result
}
