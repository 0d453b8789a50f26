//! `pd-sender`: see `pd-sender --help` and docs/architecture.md.

use std::process::ExitCode;

use pd_backend::cli;
use pd_backend::config::Role;

fn main() -> ExitCode {
    cli::daemon_main(Role::Sender)
}
