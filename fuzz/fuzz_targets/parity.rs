//! See `agent::hostile::parity`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    agent::hostile::parity(bytes);
});
