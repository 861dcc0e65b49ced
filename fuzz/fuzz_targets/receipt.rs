//! See `checkpoint_store::hostile::receipt`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checkpoint_store::hostile::receipt(bytes);
});
