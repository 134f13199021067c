use super::quantized::COEFFICIENT_RANGE;
use super::*;
use crate::codec::quantizer::SCALE_RANGE;
use crate::format::part::{PartHeaderBytes, QuantizerInfo, StoredVectors, SymbolStreams};
use crate::format::table::Table;

/// What a keyframe part of eight elements with this quantizer is refused for, if it is.
fn refusal(step: f32, scales: Option<i32>, mean: Option<(f32, i32)>) -> Option<String> {
    let tensor =
        TensorInfo { name: "weight".into(), dtype: Dtype::F32, shape: vec![8], offset_bytes: 0, length_bytes: 32 };
    let streams = SymbolStreams {
        run_elements: 8,
        runs_per_strip: 1,
        lanes: 1,
        tables: vec![0],
        table_of_run: StoredIntegers::default(),
        strip_words: integers::encode(&[0]),
        strip_exceptions: integers::encode(&[0]),
    };
    let info = QuantizerInfo {
        step,
        raw_bits: 0,
        trellis: None,
        vectors: None,
        scales: scales.map(|scale| integers::encode(&[scale])),
        means: mean.map(|(step, mean)| (step, integers::encode(&[mean]))),
        column_scales: None,
        prediction: None,
    };
    let header = PartHeader {
        coding: Coding::Quantized(info),
        streams: Some(streams),
        strip_crcs: vec![0],
        cost: PartHeaderBytes::default(),
    };
    let table = Table { codes: vec![0, 1], frequencies: vec![2048; 2], point_offsets: vec![] };
    let tables = [Arc::new(CodingTable::new(table))];
    let pools = Pools { tables: &tables, ..Pools::default() };
    PreparedPart::new(&tensor, &header, pools, None).err().map(|error| error.to_string())
}

#[test]
fn a_step_or_a_mean_that_overflows_is_an_error() {
    assert_eq!(refusal(1e38, Some(8), Some((1e30, 1 << 24))), None);
    let error = refusal(1e38, Some(16), None).expect("infinite");
    assert!(error.starts_with("scales: found 16 on a step of"), "{error}");
    let error = refusal(1.0, None, Some((-1e32, 1 << 24))).expect("infinite");
    assert!(error.starts_with("means: found 16777216 to 16777216 times -"), "{error}");
}

#[test]
fn codebooks_that_are_missing_or_of_different_lengths_are_errors() {
    let tensor =
        TensorInfo { name: "weight".into(), dtype: Dtype::F32, shape: vec![8], offset_bytes: 0, length_bytes: 32 };
    let codebooks = [2, 2, 3].map(|elements| Arc::new(Codebook::new(elements, &vec![0.5; 4 * elements])));
    let refusal = |vectors: [u16; 2]| {
        let info = QuantizerInfo {
            step: 1.0,
            raw_bits: 0,
            trellis: None,
            vectors: Some(StoredVectors { codebooks: vectors }),
            scales: None,
            means: None,
            column_scales: None,
            prediction: None,
        };
        let streams = SymbolStreams { run_elements: 8, runs_per_strip: 1, ..SymbolStreams::default() };
        let header = PartHeader {
            coding: Coding::Quantized(info),
            streams: Some(streams),
            strip_crcs: vec![0],
            cost: PartHeaderBytes::default(),
        };
        let pools = Pools { codebooks: &codebooks, ..Pools::default() };
        let prepared = PreparedPart::new(&tensor, &header, pools, None);
        prepared.map(|part| part.body_bytes()).map_err(|error| error.to_string())
    };
    assert_eq!(refusal([0, 1]), Ok(2), "four vectors of two indices of two bits");
    assert!(refusal([0, 3]).expect_err("there are three").contains("less than 3"));
    assert!(refusal([1, 2]).expect_err("two and three").contains("codewords of 3 elements"));
}

#[test]
fn coefficients_beyond_their_range_are_errors() {
    assert!(refusal(1.0, Some(SCALE_RANGE.1 + 1), None).is_some());
    assert!(refusal(1.0, Some(SCALE_RANGE.0 - 1), None).is_some());
    assert!(refusal(1.0, None, Some((1.0, COEFFICIENT_RANGE.1 + 1))).is_some());
}
