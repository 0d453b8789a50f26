//! What every measurement does around itself: both daemons started, watched, stopped, and the result printed.

use serde::Serialize;

use super::daemon::{Daemons, Extra};
use super::error::BenchError;
use super::options::DaemonOptions;
use super::pair::DaemonsReady;
use super::report::print_json;

/// Starts both daemons, measures, stops them and prints the report: as one JSON object, or as `text` has it. `measure` is given
/// each direction: one, or two where each daemon is both.
///
/// # Errors
/// Those of the daemons and of the measurement. A report is printed even when a daemon then fails to stop.
pub(super) async fn run<R: Serialize>(
    options: &DaemonOptions,
    extra: &Extra,
    json: bool,
    measure: impl AsyncFnOnce(&[DaemonsReady]) -> Result<R, BenchError>,
    text: impl FnOnce(&R) -> String,
) -> Result<(), BenchError> {
    let mut daemons = Daemons::start(options, extra).await?;
    let mut ready = vec![DaemonsReady::new(&daemons)?];
    if extra.both_ways {
        ready.push(DaemonsReady::back(&daemons)?);
    }
    let report = daemons.watch(measure(&ready)).await?;
    let stopped = daemons.stop().await;
    if json {
        print_json(&report);
    } else {
        println!("{}", text(&report));
    }
    stopped
}
