//! `pd-bench idle`: what two daemons cost that have nothing to do.

use std::time::{Duration, Instant};

use super::cpu;
use super::daemon::Extra;
use super::error::BenchError;
use super::options::IdleOptions;
use super::pair::{DaemonsReady, Pair};
use super::plan::Shape;
use super::pool::Pool;
use super::report::IdleReport;
use super::round;
use super::session;

/// After the last request, before looking: a pair that has just been busy may still be tidying up.
const SETTLE: Duration = Duration::from_secs(1);

/// Starts both daemons, ships one request so that the pair is connected, and looks.
pub(super) async fn run(options: &IdleOptions) -> Result<(), BenchError> {
    let measure = async |ready: &[DaemonsReady]| measure(options, &ready[0]).await;
    session::run(&options.daemons, &Extra::default(), options.json, measure, |report| report.sentence()).await
}

async fn measure(options: &IdleOptions, ready: &DaemonsReady) -> Result<IdleReport, BenchError> {
    let mut pair = Pair::attach(ready, Duration::from_secs(options.daemons.timeout_s)).await?;
    let (chunk_tokens, chunk_bytes) = (pair.chunk_tokens, pair.chunk_bytes);
    let shape = Shape { seed: 1, chunk_count: 1, chunk_tokens, chunk_bytes };
    round::ship(std::slice::from_mut(&mut pair), &[vec![shape.request(0)]], &Pool::new(1, chunk_bytes), |_| {}).await?;
    tokio::time::sleep(SETTLE).await;
    let started = Instant::now();
    let before = (cpu::used(pair.sender.pid)?, cpu::used(pair.receiver.pid)?);
    tokio::time::sleep(Duration::from_secs(options.seconds)).await;
    let after = (cpu::used(pair.sender.pid)?, cpu::used(pair.receiver.pid)?);
    let seconds = started.elapsed().as_secs_f64();
    let percent = |before: Duration, after: Duration| 100.0 * after.saturating_sub(before).as_secs_f64() / seconds;
    pair.detach().await?;
    Ok(IdleReport {
        engine: pair.engine,
        seconds,
        sender_percent: percent(before.0, after.0),
        receiver_percent: percent(before.1, after.1),
    })
}
