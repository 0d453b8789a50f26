//! Every engine through the trait, in two processes: one that writes and one that is written to.
//!
//! Each case runs in a process of its own, so that a library that aborts or hangs fails one test, within a bound.
#![allow(clippy::unwrap_used)]

mod figures;
mod growth;
mod large;
mod peers;
mod shared;
mod stalled;
// The bench uses the rest of it.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;
mod transfers;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pd_backend::buffer::{CopyBatch, CopyEnd, CopyStream, Memory};
use pd_backend::ids::{ConnectionId, TransferId};
use pd_backend::transfer::{ByteCopy, Ended, EngineKind, TransferError};
use rustix::net::{AddressFamily, Shutdown};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, getrlimit, setrlimit};
use support::receiver::{Receiver, serve_if_asked};
use support::sender::{Expected, Sender};
use support::skip::skip;
use support::{ENVIRONMENT, kind_named, nixl_is_here};

use figures::*;
use growth::*;
use large::*;
use peers::*;
use shared::*;
use stalled::*;
use transfers::*;

const CASE_VARIABLE: &str = "PD_TEST_CASE";
const CASE_MAX: Duration = Duration::from_secs(600);
const HIDDEN: [&str; 4] = ["this_process_has_another_role", "--exact", "--nocapture", "--test-threads=1"];

const UNIT_BYTES: u64 = 16 * 1024;
const UNIT_COUNT: u64 = 64;
const LEN_BYTES: u64 = UNIT_BYTES * UNIT_COUNT + 5;

/// A test of `case` for each engine.
macro_rules! cases {
    // Host memory alone grows.
    (any memory: $($case:ident)*; host memory: $($growing:ident)*; measured: $($measured:ident)*) => {
        fn run_case(name: &str, kind: EngineKind) {
            match name {
                $(stringify!($case) => $case(kind),)*
                $(stringify!($growing) => $growing(kind),)*
                $(stringify!($measured) => $measured(kind),)*
                other => panic!("no case {other}"),
            }
        }

        mod local {
            use super::*;
            $(#[test] fn $case() { start_case(stringify!($case), EngineKind::Local, &[]); })*
            $(#[test] fn $growing() { start_case(stringify!($growing), EngineKind::Local, &[]); })*
        }

        mod local_gpu_to_gpu {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[SENDER, RECEIVER]); })*
        }

        mod local_gpu_to_host {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[SENDER]); })*

            #[test]
            fn copies_to_memory_that_is_not_pinned() {
                let faults = ("PD_FAKE_CUDA_FAULTS", "no_host_register");
                start_gpu_case("copies_anywhere_in_a_large_buffer", EngineKind::Local, &[SENDER, faults]);
            }
        }

        mod local_host_to_gpu {
            use super::*;
            $(#[test] fn $case() { start_gpu_case(stringify!($case), EngineKind::Local, &[RECEIVER]); })*
        }

        mod measured {
            use super::*;
            $(#[test] #[ignore = "it measures, into the file PD_TEST_REPORT: scripts/gpu-check runs it"] fn $measured() {
                start_gpu_case(stringify!($measured), EngineKind::Local, &[SENDER, RECEIVER]);
            })*
        }

        mod nixl_gpu_to_gpu {
            use super::*;
            $(#[test] fn $case() {
                if nixl_is_here() && gpu_is_here("nixl with GPU memory") {
                    start_gpu_case(stringify!($case), EngineKind::Nixl, &[SENDER, RECEIVER]);
                }
            })*
        }

        mod nixl {
            use super::*;
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &[]); } })*
            $(#[test] fn $growing() { if nixl_is_here() { start_case(stringify!($growing), EngineKind::Nixl, &[]); } })*
        }

        /// Between hosts a post returns before the copies have ended: TCP does likewise, on one host as well.
        mod nixl_over_tcp {
            use super::*;
            const TCP: [(&str, &str); 1] = [("UCX_TLS", "tcp,self")];
            $(#[test] fn $case() { if nixl_is_here() { start_case(stringify!($case), EngineKind::Nixl, &TCP); } })*
            $(#[test] fn $growing() { if nixl_is_here() { start_case(stringify!($growing), EngineKind::Nixl, &TCP); } })*
        }
    };
}

cases! {
    any memory:
    one_chunk
    many_scattered_chunks
    neighbours_in_any_order
    parts_of_chunks
    two_transfers_in_flight
    two_peers_at_once
    refused_posts_write_nothing
    garbage_is_refused
    killed_before_a_post
    killed_during_writes
    restarted_under_a_new_name
    disconnected_and_connected_again
    disconnected_in_flight
    lost_and_met_again_leaves_nothing_open
    a_kept_connection_that_has_broken_is_made_anew
    no_more_files_is_said_with_the_limit
    two_nodes_write_both_ways_at_once
    loaded_twice_and_either_forgotten
    forgotten_and_loaded_again_while_another_stays
    a_way_that_has_broken_is_made_anew_for_all
    loaded_again_while_a_first_write_waits
    a_stalled_peer_holds_nobody_up
    a_stalled_peer_is_given_up_and_had_again
    disconnected_while_connecting
    copies_anywhere_in_a_large_buffer;
    host memory:
    a_large_peer_costs_what_is_written_to_it
    an_agent_that_says_something_else_is_met_anew
    the_receiver_grows
    the_sender_grows
    grown_with_writes_in_flight
    bad_growth_is_refused
    one_connection_hears_of_growth_before_another
    a_way_made_anew_leaves_the_other_direction_alone
    grown_while_connecting;
    measured:
    gpu_writes_against_copies
}

#[test]
fn this_process_has_another_role() {
    // Not a test of its own: the other processes of the tests enter here.
    if serve_if_asked() {
        return;
    }
    if let Ok(case) = std::env::var(CASE_VARIABLE) {
        let (case, engine) = case.split_once(' ').unwrap();
        run_case(case, kind_named(engine));
    }
}

fn start_case(case: &str, kind: EngineKind, environment: &[(&str, &str)]) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(HIDDEN)
        .envs(ENVIRONMENT)
        .envs(environment.iter().copied())
        .env(CASE_VARIABLE, format!("{case} {}", kind.as_str()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > CASE_MAX {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{case} did not end within {} s", CASE_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{case}: {status}");
}

const SENDER: (&str, &str) = (support::sender::MEMORY_VARIABLE, "gpu");
const RECEIVER: (&str, &str) = (support::receiver::MEMORY_VARIABLE, "gpu");

/// A case with the named ends on a GPU: the stand-in's, unless the machine's own is asked for.
fn start_gpu_case(case: &str, kind: EngineKind, ends: &[(&str, &str)]) {
    let state = tempfile::tempdir().unwrap();
    let gpu = support::gpu::environment(state.path());
    let mut environment: Vec<(&str, &str)> = gpu.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    environment.extend(ends);
    start_case(case, kind, &environment);
}

/// Whether this is to run on the machine's own GPU; says how when it is not.
fn gpu_is_here(what: &str) -> bool {
    let is_real = support::gpu::is_real();
    if !is_real {
        skip(&format!(
            "{what} needs a GPU: scripts/gpu-check, or PD_TEST_GPU=1 before the test command, on a machine with one"
        ));
    }
    is_real
}

fn start_receiver(kind: EngineKind, len_bytes: u64) -> Receiver {
    Receiver::start(&HIDDEN, kind, len_bytes, UNIT_BYTES)
}

fn pair(kind: EngineKind, len_bytes: u64) -> (Sender, Receiver, Expected, ConnectionId) {
    let mut receiver = start_receiver(kind, len_bytes);
    let mut sender = Sender::start(kind, len_bytes, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let expected = Expected::fill(&receiver);
    (sender, receiver, expected, connection)
}

fn is_out_of_range(result: Result<(), TransferError>, on: &str) {
    match result {
        Err(TransferError::OutOfRange { side, .. }) => assert_eq!(side, on),
        other => panic!("{other:?}"),
    }
}

/// A sender with all of its buffer and a receiver with the first `unit_count` units of its own.
fn lazy_pair(kind: EngineKind, unit_count: u64) -> (Sender, Receiver, Expected, ConnectionId) {
    let len_bytes = unit_count * UNIT_BYTES;
    let mut receiver = Receiver::start_lazy(&HIDDEN, kind, LEN_BYTES, len_bytes, UNIT_BYTES);
    let mut sender = Sender::start(kind, LEN_BYTES, UNIT_BYTES);
    let connection = sender.connect(&mut receiver);
    let expected = Expected::fill(&receiver);
    (sender, receiver, expected, connection)
}

fn copy(local_offset: u64, remote_offset: u64, len_bytes: u64) -> ByteCopy {
    ByteCopy { local_offset, remote_offset, len_bytes }
}

/// Whole units: (local, remote).
fn units(pairs: impl IntoIterator<Item = (u64, u64)>) -> Vec<ByteCopy> {
    pairs.into_iter().map(|(local, remote)| copy(local * UNIT_BYTES, remote * UNIT_BYTES, UNIT_BYTES)).collect()
}

#[test]
fn nothing_is_left_behind_after_sigkill() {
    // Broken in production: a daemon that is killed leaves its buffer's memory allocated until the next reboot.
    let names = || -> Vec<_> {
        let entries = std::fs::read_dir("/dev/shm").into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect()
    };
    let before = names();
    let mut receiver = start_receiver(EngineKind::Local, LEN_BYTES);
    let pid = receiver.pid();
    receiver.mapping.write(0, b"still here").unwrap();
    receiver.kill();
    // The mapping outlives its owner, and with it goes the memory: no name refers to it.
    let mut seen = [0; 10];
    receiver.mapping.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"still here");
    assert!(support::memory::Mapping::open(&receiver.handle).is_err());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    // NIXL's transports may come and go beside this test.
    let left: Vec<_> = names()
        .into_iter()
        .filter(|name| !before.contains(name) && !name.to_string_lossy().starts_with("ucx"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
