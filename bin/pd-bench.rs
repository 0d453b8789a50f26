//! `pd-bench`: arguments in, `pd_backend::bench`, exit code out.

use std::process::ExitCode;

use clap::Parser;
use pd_backend::bench::{self, Options};

fn main() -> ExitCode {
    match bench::run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
