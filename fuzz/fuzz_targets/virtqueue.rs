#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| urus_fuzz_targets::must_hold("virtqueue", data));
