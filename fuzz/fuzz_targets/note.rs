//! See `agent::hostile::note`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    agent::hostile::note(bytes);
});
