//! What comes through a connection that is authenticated: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("auth_sealed", bytes));
