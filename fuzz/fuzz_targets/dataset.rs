//! See `worker::hostile::dataset`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    worker::hostile::dataset(bytes);
});
