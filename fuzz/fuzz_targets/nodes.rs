//! See `checkpoint_store::hostile::nodes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checkpoint_store::hostile::nodes(bytes);
});
