//! What a peer of the engine `local` says of its process and memory: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("local_blob", bytes));
