//! See `worker::hostile::greeting`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    worker::hostile::greeting(bytes);
});
