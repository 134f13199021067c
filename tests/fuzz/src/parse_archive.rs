//! Opens any bytes as an archive and decodes all of it: an error is fine, a panic, a hang or a gigabyte is a finding.
//!
//! Checksums would stop almost every mutation at the door, so the mutator changes an archive's parts (index before
//! deflation, or records) and then makes the checksums right again: see `repair`.

#![no_main]

mod open;
mod repair;

use std::sync::Arc;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use mcwcfs::materialize::{EngineChoice, MaterializeOptions, Materializer};
use open::open;

/// Larger claims are not decoded: a small archive may rightly hold much, and time is better spent on more archives.
const DECODED_BYTES: u64 = 4 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some(archive) = open(bytes) else { return };
    if archive.files().iter().map(|file| file.length_bytes).sum::<u64>() > DECODED_BYTES {
        return;
    }
    let materializer = Materializer::new(MaterializeOptions { cache_bytes: 1 << 20, engine: EngineChoice::Reference, ..MaterializeOptions::default() });
    let archive = Arc::new(archive);
    for (number, file) in archive.files().iter().enumerate() {
        // An odd window: strips and tensors are entered and left in their middle.
        let mut window = vec![0; 4093];
        let mut offset = 0;
        while let Ok(read @ 1..) = materializer.read(&archive, number, offset, &mut window) {
            offset += read as u64;
        }
        assert!(offset <= file.length_bytes, "no byte is read past the end");
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    repair::mutate(data, size, max_size, seed)
});
