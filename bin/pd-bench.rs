//! `pd-bench`: arguments in, `pd_backend::bench`, exit code out.

use std::process::ExitCode;

use clap::Parser;
use pd_backend::bench::{self, BenchOptions};

fn main() -> ExitCode {
    match bench::run(&BenchOptions::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
