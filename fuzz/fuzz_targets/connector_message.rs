//! What an engine says to its daemon, and what it hears: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("connector_message", bytes));
