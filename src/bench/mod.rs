//! `pd-bench`: both daemons on this machine, driven through the connector API as an engine would drive them.
//!
//! | command    | question |
//! |------------|----------|
//! | `loopback` | do chunks arrive whole, and how fast against a memcpy of the same bytes in the same run? |
//! | `latency`  | how long does one small chunk, or an allocation of many, take against a bare ZeroMQ round trip? |
//! | `idle`     | what do two daemons cost that have nothing to do? |
//! | `status`   | what does a running daemon have, and what has it counted? |
//!
//! Nothing here is part of a daemon: it knows them by their command line and the connector API.

mod baseline;
mod cpu;
mod daemon;
mod error;
mod idle;
mod latency;
mod link;
mod loopback;
mod options;
mod pair;
mod ping;
mod plan;
mod pool;
mod report;
mod round;
mod scrape;
mod session;
mod status;
mod summary;

pub use error::BenchError;
pub use options::{BenchOptions, Command, DaemonOptions, IdleOptions, LatencyOptions, LoopbackOptions, StatusOptions};

/// Does what the command line asks for, and prints the result on standard output.
///
/// # Errors
/// [`BenchError`]; its [`exit_code`](BenchError::exit_code) is the process's.
pub fn run(options: &BenchOptions) -> Result<(), BenchError> {
    // One thread: a daemon that asks for a signal at its parent's death means the thread that started it, so that
    // thread must live as long as this process.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| BenchError::Machine { what: "starting an async runtime", source })?;
    let outcome = runtime.block_on(async {
        match &options.command {
            Command::Loopback(options) => loopback::run(options).await,
            Command::Latency(options) => latency::run(options).await,
            Command::Idle(options) => idle::run(options).await,
            Command::Status(options) => status::run(options).await,
            Command::Echo => ping::serve().await,
        }
    });
    // A socket's own task may still be closing; nothing of it is worth waiting for.
    runtime.shutdown_background();
    outcome
}
