//! Every engine that this CPU has gives the reference decoder's bytes, and its errors.

use proptest::prelude::*;
use proptest::sample::Index;

use crate::decode::random_parts::{ConcatAll, Kind, Recipe, decode_each, decode_together, recipes};
use crate::decode::reference::ReferenceEngine;
use crate::decode::select::cpu_engines;
use crate::decode::{DecodeError, Engine};
use crate::format::part::Carrier;
use crate::format::strip::LANES;
use crate::tensor::Dtype;

/// Miri takes a thousand times as long.
const CASES: u32 = if cfg!(miri) { 3 } else { 400 };

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn every_engine_returns_the_bytes_of_the_reference(recipe in recipes()) {
        let random = recipe.make();
        let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
        for engine in cpu_engines() {
            prop_assert_eq!(&decode_each(&engine, &random).concat_all(), &expected, "{} strip by strip", engine.name());
            let together = decode_together(&engine, &random);
            prop_assert_eq!(together.as_ref(), Ok(&expected), "{} together", engine.name());
        }
    }

    #[test]
    fn damaged_strips_give_every_engine_the_reference_s_error_or_its_bytes(
        recipe in recipes(),
        places in prop::collection::vec((any::<Index>(), 1_u8..), 1..4),
    ) {
        let random = recipe.make().damaged(&places);
        let expected = decode_each(&ReferenceEngine, &random);
        for engine in cpu_engines() {
            prop_assert_eq!(&decode_each(&engine, &random), &expected, "{}", engine.name());
        }
    }
}

#[test]
fn elements_are_joined_with_any_number_of_raw_bits() {
    let rows = if cfg!(miri) { 2 } else { 40 };
    for (dtype, most) in [(Dtype::BF16, 16), (Dtype::F32, 32)] {
        for (raw_bits, columns) in (1..=most).flat_map(|raw_bits| [(raw_bits, 96), (raw_bits, 100)]) {
            let coding = Kind::Split(Carrier::Own, raw_bits);
            let dtype = dtype.clone();
            let (run_elements, runs_per_strip, lanes) = (None, 3, LANES);
            let (exceptions, seed) = (false, raw_bits.into());
            let recipe = Recipe { dtype, coding, rows, columns, run_elements, runs_per_strip, lanes, exceptions, seed };
            let random = recipe.make();
            let expected = decode_together(&ReferenceEngine, &random).expect("sound strips");
            for engine in cpu_engines() {
                let found = decode_together(&engine, &random);
                assert_eq!(found.as_ref(), Ok(&expected), "{}: {recipe:?}", engine.name());
            }
        }
    }
}

#[test]
fn a_wrong_checksum_is_an_error_of_every_engine() {
    let recipe = Recipe {
        dtype: Dtype::BF16,
        coding: Kind::Split(Carrier::Own, 8),
        rows: 4,
        columns: 64,
        run_elements: None,
        runs_per_strip: 4,
        lanes: LANES,
        exceptions: false,
        seed: 1,
    };
    let mut random = recipe.make();
    random.body[5] ^= 1;
    for engine in cpu_engines() {
        let error = decode_each(&engine, &random).remove(0).expect_err("a damaged strip");
        assert!(matches!(error, DecodeError::StripChecksum { strip: 0, .. }), "{error}");
    }
}
