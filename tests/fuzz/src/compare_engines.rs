//! Decodes every strip of any bytes with every engine that this CPU has: the reference decoder's bytes, or its error.
//!
//! The mutator is that of `parse_archive`: strips, tables and side information are damaged, checksums made right again.

#![no_main]

mod open;
mod repair;

use std::collections::HashMap;

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use mcwcfs::archive::{Archive, PartAddress};
use mcwcfs::decode::reference::ReferenceEngine;
use mcwcfs::decode::select::cpu_engines;
use mcwcfs::decode::{DecodeError, Engine, PreparedPart, StripJob};
use mcwcfs::materialize::prepare_record;
use open::open;

/// Larger claims are not decoded: every engine decodes everything twice.
const DECODED_BYTES: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some(archive) = open(bytes) else { return };
    if archive.files().iter().map(|file| file.length_bytes).sum::<u64>() > DECODED_BYTES {
        return;
    }
    // What later records are predicted from, where it decodes.
    let mut decoded = HashMap::new();
    for record in 0..archive.index().records.len() as u32 {
        let Ok(parts) = prepare_record(&archive, record) else { continue };
        for (ordinal, part) in (0..).zip(&parts) {
            let address = PartAddress { record, part: ordinal };
            let reference: Option<&Vec<u8>> = match (part.prediction(), archive.record(record).reference) {
                (Some(prediction), Some(below)) => {
                    let address = PartAddress { record: below, part: prediction.reference_part };
                    let Some(reference) = decoded.get(&address) else { continue };
                    Some(reference)
                }
                _ => None,
            };
            if let Some(bytes) = compare(&archive, address, part, reference.map(Vec::as_slice)) {
                decoded.insert(address, bytes);
            }
        }
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    repair::mutate(data, size, max_size, seed)
});

/// Decodes a part with every engine, strip by strip and all strips together. Gives its bytes if it decodes.
fn compare(archive: &Archive, address: PartAddress, part: &PreparedPart, reference: Option<&[u8]>) -> Option<Vec<u8>> {
    let mut stored = vec![0; part.body_bytes() as usize];
    archive.read_body(address, 0, &mut stored).ok()?;
    let each = |engine: &dyn Engine| -> Vec<Result<Vec<u8>, DecodeError>> {
        let strips = 0..part.strips();
        strips
            .map(|strip| {
                let range = part.strip_range(strip);
                let mut out = vec![0xa5; part.strip_output_bytes(strip)];
                let stored = &stored[range.start as usize..range.end as usize];
                engine.decode_strip(part, strip, stored, reference, &mut out).map(|()| out)
            })
            .collect()
    };
    let expected = each(&ReferenceEngine);
    let whole: Option<Vec<u8>> =
        expected.iter().map(|strip| strip.clone().ok()).collect::<Option<Vec<_>>>().map(|all| all.concat());
    for engine in cpu_engines() {
        assert_eq!(each(&engine), expected, "{} of {address:?}", engine.name());

        let mut out = vec![0xa5; part.length_bytes() as usize];
        let mut jobs: Vec<StripJob<'_>> = out
            .chunks_mut(part.full_strip_output_bytes() as usize)
            .enumerate()
            .map(|(strip, out)| StripJob { strip, stored: &stored[part.strip_range(strip).start as usize..], out })
            .collect();
        let together = engine.decode_strips(part, reference, &mut jobs).is_ok();
        assert_eq!(together.then_some(&out), whole.as_ref(), "{} of {address:?}, together", engine.name());
    }
    whole
}
