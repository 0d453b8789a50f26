//! What somebody whom we connected to answers: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("auth_dealer", bytes));
