//! See `worker::hostile::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    worker::hostile::frame(bytes);
});
