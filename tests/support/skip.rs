//! Tests that cannot run on this machine.

use std::io::Write;

/// Says that the running test is skipped, why, and how to run it, in one line that `scripts/count-tests` counts: libtest
/// has no skipped tests and reports this one as passed. The line goes to stderr itself, because libtest drops what a
/// test that passes has printed with `eprintln!`.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let line = format!("\nskipped: {}: {}\n", thread.name().unwrap_or("a test"), why.replace('\n', "; "));
    // One write, so that no other thread's line comes between.
    std::io::stderr().write_all(line.as_bytes()).expect("stderr can be written to");
}
