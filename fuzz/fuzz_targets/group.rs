//! See `agent::hostile::group`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    agent::hostile::group(bytes);
});
