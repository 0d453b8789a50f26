//! From a command line to an exit code.

use std::fmt::{self, Debug, Write};
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Args, Command, FromArgMatches};
use tracing::field::Field;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::config::{Config, Options, Role};
use crate::ids::Escaping;
use crate::runtime::{self, RunOptions, RuntimeError};
use crate::transfer::{nixl, open_files};

/// Exit code for a configuration that cannot be used.
const EXIT_CONFIGURATION: u8 = 2;

/// The whole of `pd-sender` and `pd-receiver`.
pub fn daemon_main(role: Role) -> ExitCode {
    let (name, about) = match role {
        Role::Sender => (
            "pd-sender",
            "Sends the KV chunks of a prefill worker to decode workers. Run one beside each prefill worker. With pd_role: both \
             in its configuration it also receives, into the same buffer.",
        ),
        // No binary has both halves by itself.
        Role::Receiver | Role::Both => (
            "pd-receiver",
            "Receives KV chunks for a decode worker. Run one beside each decode worker. With pd_role: both in its \
             configuration it also sends, from the same buffer.",
        ),
    };
    let command = Options::augment_args(Command::new(name)).version(env!("CARGO_PKG_VERSION")).about(about).after_help(
        "Prints one JSON line on stdout when it is ready; logs go to stderr (PD_LOG=debug for more).\n\
             SIGTERM, SIGINT or SIGHUP drains and stops, a second one stops at once.\n\
             Exit codes: 0 fine, 2 configuration, 3 the machine (no NIXL, no GPU, port taken), 1 the rest.",
    );
    // clap exits by itself: 0 after --help, 2 after a wrong argument, which is our code for configuration too.
    let options = match Options::from_arg_matches(&command.get_matches()) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    // Before any thread exists, since it sets the environment that NIXL's libraries read when they are loaded.
    let prepared = nixl::prepare_environment();
    if let Err(error) = runtime::check_threads() {
        // The log is a thread.
        eprintln!("{}: {error}", role.daemon());
        return ExitCode::from(error.exit_code());
    }
    let _log = start_logging();
    if let Err(error) = prepared {
        tracing::warn!("{error}");
    }
    let loaded = match Config::load(role, &options) {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(EXIT_CONFIGURATION);
        }
    };
    for note in &loaded.notes {
        tracing::info!("{note}");
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    if options.check {
        print!("{}", loaded.config.to_yaml());
        return exit_code(runtime::check_machine(&loaded.config));
    }
    tracing::info!("configuration: {}", loaded.config.to_line());
    if let (before, now @ Some(limit)) = open_files::raise_limit()
        && before != now
    {
        tracing::info!(limit, "the limit of open files is raised");
    }
    exit_code(runtime::run(loaded.config, RunOptions { exit_with_parent: options.exit_with_parent }))
}

/// Says why a daemon could not go on.
fn exit_code(result: Result<(), RuntimeError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Lines that may wait for a stderr that nobody reads; more are dropped, because a daemon must not wait for its log.
const LOG_LINES_QUEUED_MAX: usize = 8192;

/// Logs to stderr; stdout is for the ready line. The log is written while the guard lives.
fn start_logging() -> WorkerGuard {
    let filter = EnvFilter::try_from_env("PD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LOG_LINES_QUEUED_MAX)
        .thread_name("log")
        .finish(std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .fmt_fields(debug_fn(write_field).delimited(" "))
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    guard
}

/// Writes one field of an event. Whatever text it has, from a peer, a client, a file or the command line, the event stays one
/// line.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> fmt::Result {
    let mut writer = Escaping(writer);
    match field.name() {
        "message" => write!(writer, "{value:?}"),
        name => write!(writer, "{name}={value:?}"),
    }
}
