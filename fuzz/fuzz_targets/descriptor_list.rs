//! A pickle where LMCache's peers say where their pages are: see `src/fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pd_backend::fuzzing::play("descriptor_list", bytes));
