//! What a NIXL agent says of itself: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("nixl_metadata", bytes));
