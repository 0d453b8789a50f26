//! Deterministic simulation: nodes that send, that receive and that do both, in a world of processes, networks, engines and
//! connectors that a seed makes slow, lossy, forgetful or dead. No socket, no clock: the same seed is the same run.
//!
//! | file | what is in it |
//! |---|---|
//! | `plan` | how unkind a world is |
//! | `events`, `process` | what can happen, and whom to: daemons, each a sender, a receiver, or both |
//! | `world` | the order of events, timers; what must be so at the end |
//! | `lives` | processes that crash, begin again and stand still |
//! | `network`, `engine` | links and writes of any quality |
//! | `daemon_io`, `sender_io`, `receiver_io` | the nodes, and what they ask of the world |
//! | `jobs`, `prefill`, `decode` | what routers want of our senders; connectors |
//! | `parked` | requests whose receiver is not known, and receivers that ask for them |
//! | `lmcache` | LMCache's own peers: what the world knows of them |
//! | `lmcache_sender`, `lmcache_prefill` | its senders, their engines, and the router |
//! | `lmcache_receiver` | its receivers, and the engine that reads there |
//! | `ranks` | servers of several ranks, whose receivers decide each for itself |
//! | `truth` | what is really so in a daemon's memory, held against what the nodes do |
//!
//! After every event the node that it touched checks itself, and the world checks what it did: see docs/reliability.md.

#![allow(clippy::unwrap_used)]

mod daemon_io;
mod decode;
mod engine;
mod events;
mod jobs;
mod lives;
mod lmcache;
mod lmcache_prefill;
mod lmcache_receiver;
mod lmcache_sender;
mod network;
mod parked;
mod plan;
mod prefill;
mod process;
mod ranks;
mod receiver_io;
mod sender_io;
mod tally;
mod truth;
mod world;

use pd_backend::node::Safeguard;
use plan::Plan;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tally::Tally;
use world::World;

/// How many seeds `make test` plays; `PD_SEEDS` says another number, `PD_SEED` plays one alone.
const SEEDS: u64 = 4000;

/// Within how many seeds the absence of a safeguard must be noticed.
const WITHOUT_SEEDS_MAX: u64 = 4000;
/// So many failing seeds are enough to see what they have in common.
const FAILURES_SHOWN_MAX: usize = 20;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} = {text:?} is no number")))
}

/// Whether one seed is replayed alone; whatever else there is leaves it alone.
fn replays_one() -> bool {
    variable("PD_SEED").is_some()
}

fn replay_hint(seed: u64) -> String {
    format!("replay it with PD_SEED={seed} cargo nextest run --test simulation")
}

/// The seeds of one of `shares` tests that play at the same time.
fn play_share(share: u64, shares: u64) {
    if let Some(seed) = variable("PD_SEED") {
        if share == 0 {
            let mut world = World::new(seed, true);
            let result = world.run();
            println!("{}", world.log());
            println!("seed {seed}: {result:?}");
            assert!(result.is_ok(), "seed {seed}: {result:?}");
        }
        return;
    }
    let (first, seeds) = (variable("PD_FIRST_SEED").unwrap_or(0), variable("PD_SEEDS").unwrap_or(SEEDS));
    let mut total = Tally::default();
    let mut failures = Vec::new();
    for seed in (first..first + seeds).filter(|seed| seed % shares == share) {
        let printed = PrintSeed(seed);
        match World::new(seed, false).run() {
            Ok(tally) => total.add(&tally),
            Err(text) => failures.push(format!("seed {seed}: {text}; {}", replay_hint(seed))),
        }
        std::mem::forget(printed);
        if failures.len() == FAILURES_SHOWN_MAX {
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{} seeds: {total:?}", seeds / shares);
    if seeds >= SEEDS {
        total.assert_everything_happened();
    }
}

/// Names the seed when the code under test panics.
struct PrintSeed(u64);

impl Drop for PrintSeed {
    fn drop(&mut self) {
        eprintln!("failing seed: {}; {}", self.0, replay_hint(self.0));
    }
}

// In two tests, so that two cores play.
#[test]
fn every_seed_even() {
    // Broken in production: a request hangs, is reported twice, or a decode worker reads bytes that nobody sent.
    play_share(0, 2);
}

#[test]
fn every_seed_odd() {
    // Broken in production: as above.
    play_share(1, 2);
}

#[test]
fn a_calm_world_sends_everything() {
    // Broken in production: requests fail although nothing is wrong.
    if replays_one() {
        return;
    }
    for seed in 0..50 {
        let mut world = World::with_plan(StdRng::seed_from_u64(seed), Plan::calm(), true);
        let tally = world.run().unwrap_or_else(|text| panic!("seed {seed}: {text}"));
        if tally.failed > 0 {
            println!("{}", world.log());
        }
        assert_eq!(tally.failed, 0, "seed {seed}: {tally:?}");
    }
}

#[test]
fn a_calm_world_brings_what_is_parked() {
    // Broken in production: decode computes what prefill has computed, although nothing is wrong.
    if replays_one() {
        return;
    }
    let mut total = Tally::default();
    for seed in 0..100 {
        let plan = Plan { parked: 100, ahead: seed % 2 == 1, sender_slots: 40, receiver_slots: 40, ..Plan::calm() };
        let mut world = World::with_plan(StdRng::seed_from_u64(seed), plan, true);
        let tally = world.run().unwrap_or_else(|text| panic!("seed {seed}: {text}"));
        if tally.failed > 0 {
            println!("{}", world.log());
        }
        assert_eq!(tally.failed, 0, "seed {seed}: {tally:?}");
        total.add(&tally);
    }
    assert!(total.parked > 1000 && total.fetched_parked > total.parked, "{total:?}");
    assert!(total.pushed_ahead > 100, "{total:?}");
}

#[test]
fn guesses_in_rough_worlds() {
    // Broken in production: what nobody has asked for takes the room of what was asked for, a registration waits for a guess that
    // comes to nothing, or a decode worker reads bytes that nobody sent.
    if replays_one() {
        return;
    }
    let mut total = Tally::default();
    for seed in 0..300 {
        let (rng, plan) = Plan::of_seed(seed);
        let plan = Plan { parked: 100, ahead: true, receivers: 1 + seed as usize % 2, both: 0, crowded: false, ..plan };
        let plan = Plan { lmcache_senders: 0, lmcache_receivers: 0, lmcache_jobs: 0, sender_slots: 10, ..plan };
        match World::with_plan(rng, plan, false).run() {
            Ok(tally) => total.add(&tally),
            Err(text) => panic!("seed {seed}: {text}"),
        }
    }
    let seen = [total.pushed_ahead, total.ahead_dropped, total.wrong_guesses, total.seen_coming];
    assert!(seen.into_iter().all(|count| count > 50), "{total:?}");
}

#[test]
fn a_receiver_that_is_slow_to_check_is_waited_for() {
    // Broken in production: right requests fail by the commit's deadline, or by the grant's, because their receiver has
    // much to sum.
    if replays_one() {
        return;
    }
    let mut total = Tally::default();
    for seed in 0..50 {
        let mut world = World::with_plan(StdRng::seed_from_u64(seed), Plan::slow_to_check(), true);
        let tally = world.run().unwrap_or_else(|text| panic!("seed {seed}: {text}"));
        if tally.failed > 0 {
            println!("{}", world.log());
        }
        assert_eq!(tally.failed, 0, "seed {seed}: {tally:?}");
        total.add(&tally);
    }
    assert!(total.sent > 300 && total.verifying > 300, "{total:?}");
}

#[test]
fn caches_are_reset_in_rough_worlds() {
    // Broken in production: after an update of the weights a decode worker reads what was computed with the former ones;
    // or a reset leaves a request without an end, or slots that are nobody's.
    if replays_one() {
        return;
    }
    for seed in 0..200 {
        let (rng, plan) = Plan::of_seed(seed);
        let plan = Plan { resets: 30, ..plan };
        let result = World::with_plan(rng, plan, false).run();
        assert!(result.is_ok(), "seed {seed}: {result:?}");
    }
}

#[test]
fn hundreds_of_senders_and_receivers() {
    // Broken in production: what holds between two daemons does not between hundreds.
    if replays_one() {
        return;
    }
    let mut world = World::with_plan(StdRng::seed_from_u64(1), Plan::many(), false);
    let tally = world.run().unwrap_or_else(|text| panic!("{text}"));
    assert!(tally.sent > 500, "{tally:?}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    // Broken in production: a failing seed cannot be replayed, so the bug behind it is never found.
    let play = |seed| {
        let mut world = World::new(seed, true);
        let result = world.run();
        (world.log().to_owned(), result)
    };
    for seed in [7, 8] {
        let (first, second) = (play(seed), play(seed));
        assert!(first.0.len() > 10_000, "the log is empty");
        assert!(first == second, "seed {seed} was played twice, and differently");
    }
}

/// Plays seeds without one of the safeguards until something goes wrong.
fn found_without(safeguard: Safeguard, seeds: u64) -> Option<(u64, String)> {
    (0..seeds).find_map(|seed| {
        let (rng, plan) = Plan::of_seed(seed);
        // A checksum finds some of it as well, before anybody reads it.
        let plan = Plan { without: Some(safeguard), checksums: false, ..plan };
        // The code under test may notice first, and panic.
        let played = std::panic::catch_unwind(|| World::with_plan(rng, plan, false).run());
        match played {
            Ok(Ok(_)) => None,
            Ok(Err(text)) => Some((seed, text)),
            Err(_) => Some((seed, "a panic".into())),
        }
    })
}

#[test]
fn without_a_safeguard_something_is_found() {
    // Broken in production: nothing, but the simulation would not notice if it were.
    if replays_one() {
        return;
    }
    let ours = [
        Safeguard::Quarantine,
        Safeguard::GrantCheck,
        Safeguard::WholeRequests,
        Safeguard::CommitBeforeNotify,
        Safeguard::EndsToldOnce,
        Safeguard::FailureAcknowledged,
        Safeguard::SentChunksHeld,
        Safeguard::SurePart,
        Safeguard::OtherHalfWoken,
    ];
    let lmcaches = [Safeguard::CopiesToldApart, Safeguard::Linger, Safeguard::UnwrittenRemembered];
    let lmcaches = if cfg!(feature = "lmcache") { &lmcaches[..] } else { &[] };
    for &safeguard in ours.iter().chain(lmcaches) {
        let found = found_without(safeguard, WITHOUT_SEEDS_MAX);
        let (seed, text) =
            found.unwrap_or_else(|| panic!("without {safeguard:?} nothing was found in {WITHOUT_SEEDS_MAX} seeds"));
        println!("without {safeguard:?}: seed {seed}: {text}");
    }
}

/// Of so many worlds of servers with several ranks, those in which requests wait for each other for ever.
fn stuck(ranks: usize, in_order: bool, seeds: u64) -> Vec<u64> {
    let is_stuck = |seed: &u64| {
        let printed = PrintSeed(*seed);
        let left = ranks::Ranks::new(*seed, ranks, in_order).run();
        std::mem::forget(printed);
        left.unwrap_or_else(|text| panic!("seed {seed}, {ranks} ranks: {text}")) > 0
    };
    (0..seeds).filter(is_stuck).collect()
}

#[test]
fn requests_of_several_ranks_do_not_wait_for_each_other() {
    // Broken in production: two prefill servers send large prompts to one decode server. Its first rank has granted one of them, its
    // second rank the other, and each waits for what the other has, for ever.
    if replays_one() {
        return;
    }
    for ranks in [2, 4] {
        assert_eq!(stuck(ranks, true, 300), Vec::<u64>::new(), "{ranks} ranks");
        assert!(
            !stuck(ranks, false, 40).is_empty(),
            "{ranks} ranks that ask at once are never seen to wait for each other"
        );
    }
}
