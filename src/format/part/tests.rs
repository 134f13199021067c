//! Every header that can be written is read back as it was.

use super::*;
use proptest::prelude::*;

fn integers() -> impl Strategy<Value = StoredIntegers> {
    prop::collection::vec(any::<u8>(), 0..5).prop_map(StoredIntegers)
}

fn finite() -> impl Strategy<Value = f32> {
    prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO
}

fn placement() -> impl Strategy<Value = StoredPlacement> {
    (any::<u8>(), 0..=limits::BLOCKS as u32, any::<bool>(), any::<u32>())
        .prop_map(|(axis, repeat, per_member, unit)| StoredPlacement { axis, repeat, per_member, unit })
}

fn prediction() -> impl Strategy<Value = StoredPrediction> {
    let predictor = prop_oneof![
        finite().prop_map(|gain| StoredPredictor::ScaledCopy { gain }),
        (finite(), finite(), integers(), integers()).prop_map(|(gain_step, offset_step, gains, offsets)| {
            StoredPredictor::RowAffine { gain_step, offset_step, gains, offsets }
        }),
    ];
    (0..=limits::PARTS as u32, prop::option::of(placement()), predictor)
        .prop_map(|(reference_part, placement, predictor)| StoredPrediction { reference_part, placement, predictor })
}

fn quantizer() -> impl Strategy<Value = QuantizerInfo> {
    let trellis = prop_oneof![Just(StoredTrellis::SharedTables), Just(StoredTrellis::TablePairs)];
    (
        finite().prop_filter_map("steps are positive", |step| (step != 0.0).then_some(step.abs())),
        0..=8_u8,
        prop::option::of(trellis),
        prop::option::of(integers()),
        prop::option::of((finite(), integers())),
        prop::option::of(prediction()),
    )
        .prop_map(|(step, raw_bits, trellis, scales, means, prediction)| QuantizerInfo {
            step,
            raw_bits,
            trellis,
            scales,
            means,
            prediction,
        })
}

fn streams() -> impl Strategy<Value = SymbolStreams> {
    let tables = prop::collection::vec(any::<u16>(), 0..4);
    (1..=256_u32, 1..=256_u32, tables, [integers(), integers(), integers()]).prop_map(
        |(run_elements, runs_per_strip, tables, [table_of_run, strip_words, strip_exceptions])| SymbolStreams {
            run_elements,
            runs_per_strip,
            table_of_run: if tables.len() < 2 { StoredIntegers::default() } else { table_of_run },
            tables,
            strip_words,
            strip_exceptions,
        },
    )
}

fn header() -> impl Strategy<Value = PartHeader> {
    let carrier = prop::sample::select(vec![Carrier::Own, Carrier::Bf16, Carrier::F16]);
    let split =
        (carrier, 1..=limits::RAW_BITS as u8).prop_map(|(carrier, raw_bits)| Coding::Split { carrier, raw_bits });
    let coding = prop_oneof![Just(Coding::Raw), split, quantizer().prop_map(Coding::Quantized)];
    (coding, streams(), prop::collection::vec(any::<u32>(), 0..4)).prop_map(|(coding, streams, strip_crcs)| {
        let streams = (coding != Coding::Raw).then_some(streams);
        PartHeader { coding, streams, strip_crcs, cost: PartHeaderBytes::default() }
    })
}

proptest! {
    #[test]
    fn a_header_comes_back_and_every_byte_of_it_is_accounted_for(header in header()) {
        let mut writer = Writer::new();
        header.write(&mut writer);
        let bytes = writer.into_bytes();
        let mut reader = Reader::new("side information", &bytes);
        let PartHeader { coding, streams, strip_crcs, cost } = PartHeader::parse(&mut reader).expect("just written");
        prop_assert_eq!(reader.end(), Ok(()));
        prop_assert_eq!((coding, streams, strip_crcs), (header.coding, header.streams, header.strip_crcs));
        prop_assert_eq!(cost.quantizer + cost.entropy_model + cost.metadata, bytes.len() as u64);
    }

    #[test]
    fn a_truncated_header_is_an_error(header in header(), cut in any::<prop::sample::Index>()) {
        let mut writer = Writer::new();
        header.write(&mut writer);
        let bytes = writer.into_bytes();
        let mut reader = Reader::new("side information", &bytes[..cut.index(bytes.len())]);
        prop_assert!(PartHeader::parse(&mut reader).is_err());
    }
}
