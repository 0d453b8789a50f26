//! A file of `--kv-layout`: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("layout_json", bytes));
