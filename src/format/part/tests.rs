use super::*;
use crate::format::difference::{StoredDifference, StoredLowRank};
use proptest::prelude::*;

fn integers() -> impl Strategy<Value = StoredIntegers> {
    prop::collection::vec(any::<u8>(), 0..20).prop_map(StoredIntegers)
}

fn predictions() -> impl Strategy<Value = StoredPrediction> {
    let placement = (any::<u8>(), 0..1000_u32, any::<bool>(), any::<u32>())
        .prop_map(|(axis, repeat, per_member, unit)| StoredPlacement { axis, repeat, per_member, unit });
    let affine =
        (-9.0_f32..9.0, -9.0_f32..9.0, integers(), integers()).prop_map(|(gain_step, offset_step, gains, offsets)| {
            StoredPredictor::RowAffine { gain_step, offset_step, gains, offsets }
        });
    let copy = (-9.0_f32..9.0).prop_map(|gain| StoredPredictor::ScaledCopy { gain });
    let vectors = (any::<u8>(), -9.0_f32..9.0, [integers(), integers(), integers()]).prop_map(
        |(axis, gain_step, [counts, sources, gains])| StoredPredictor::MotionVectors {
            axis,
            gain_step,
            counts,
            sources,
            gains,
        },
    );
    let places = (0..16_u16, 0..64_u16, prop::option::of(0..4096_u16), prop::option::of(0..1000_u32));
    let network = (places, -9.0_f32..9.0, -9.0_f32..9.0).prop_map(
        |((network, kind, layer, second_part), input_scale, output_scale)| StoredPredictor::Network {
            network,
            kind,
            layer,
            input_scale,
            output_scale,
            second_part,
        },
    );
    (0..1000_u32, prop::option::of(placement), prop_oneof![copy, affine, vectors, network])
        .prop_map(|(reference_part, placement, predictor)| StoredPrediction { reference_part, placement, predictor })
}

fn based() -> impl Strategy<Value = Coding> {
    let low_rank = (1..=256_u32, -1.0_f32..1.0, integers(), integers())
        .prop_map(|(rank, scale, left, right)| StoredLowRank { rank, scale, left, right });
    let difference = (0..32_u8, 0..32_u8, 1..=u32::MAX, integers(), integers()).prop_map(
        |(zero_bits, class_shift, class_row, class_offsets, table_raw_bits)| StoredDifference {
            zero_bits,
            class_shift,
            class_row,
            class_offsets,
            table_raw_bits,
        },
    );
    let place = (0..16_u32, 0..65_536_u32, any::<u32>());
    (place, prop::option::of(low_rank), prop::option::of(difference)).prop_map(
        |((base, file, tensor), low_rank, difference)| {
            Coding::Based(BasedInfo { reference: BaseTensor { base, file, tensor }, low_rank, difference })
        },
    )
}

fn codings() -> impl Strategy<Value = Coding> {
    let tables = prop::sample::select(vec![TrellisTables::Shared, TrellisTables::Pairs]);
    let trellis =
        (tables, limits::TRELLIS_STATE_BITS).prop_map(|(tables, state_bits)| StoredTrellis { tables, state_bits });
    let trellis = prop::option::of(trellis);
    let means = prop::option::of((-1.0_f32..1.0, integers()));
    let vectors = prop::option::of([0..256_u16, 0..256_u16].prop_map(|codebooks| StoredVectors { codebooks }));
    let codes = (0..=8_u8, trellis, vectors).prop_map(|(raw_bits, trellis, vectors)| match vectors {
        Some(_) => (0, None, vectors),
        None => (raw_bits, trellis, None),
    });
    let scales = || prop::option::of(integers());
    let quantizer = (1e-6_f32..9.0, codes, scales(), means, scales(), prop::option::of(predictions()))
        .prop_map(|(step, (raw_bits, trellis, vectors), scales, means, column_scales, prediction)| {
            let info = QuantizerInfo { step, raw_bits, trellis, vectors, scales, means, column_scales, prediction };
            Coding::Quantized(info)
        })
        .boxed();
    let from_base = (quantizer.clone(), 0..16_u32).prop_map(|(coding, base)| match coding {
        Coding::Quantized(info) if info.prediction.is_none() && info.vectors.is_none() => {
            Coding::QuantizedFromBase(BaseTensor { base, file: 1, tensor: 2 }, info)
        }
        other => other,
    });
    let carrier = prop::sample::select(vec![Carrier::Own, Carrier::Bf16, Carrier::F16]);
    let split = (carrier, 1..=56_u8, prop::option::of(integers()))
        .prop_map(|(carrier, raw_bits, zero_bits)| Coding::Split { carrier, raw_bits, zero_bits });
    let values = prop::collection::vec(0..16_u64, 0..=61);
    let units = (prop::sample::select(vec![4_u8, 8, 16, 32, 64]), any::<bool>(), values);
    let units = units.prop_map(|(unit_bits, has_differences, values)| {
        let raw_bits = if values.is_empty() { unit_bits / 4 } else { 0 };
        Coding::Units(UnitsInfo { unit_bits, raw_bits, has_differences, values })
    });
    prop_oneof![Just(Coding::Raw), split, quantizer, from_base, units, based()]
}

proptest! {
    #[test]
    fn every_header_comes_back_and_its_cost_is_its_length(
        coding in codings(),
        tables in prop::collection::vec(0..4096_u16, 0..4),
        arrays in [integers(), integers(), integers()],
        run_elements in 1..256_u32,
        lane_bits in 0..6_u8,
        strip_crcs: Vec<u32>,
    ) {
        let [table_of_run, strip_words, strip_exceptions] = arrays;
        let table_of_run = if tables.len() > 1 { table_of_run } else { StoredIntegers::default() };
        let streams =
            SymbolStreams { run_elements, runs_per_strip: 256, lanes: 1_u8 << lane_bits, tables, table_of_run, strip_words, strip_exceptions };
        let streams = if coding.has_vectors() {
            Some(SymbolStreams { run_elements, runs_per_strip: 256, ..SymbolStreams::default() })
        } else {
            coding.has_symbols().then_some(streams)
        };
        let header = PartHeader { coding, streams, strip_crcs, cost: PartHeaderBytes::default() };
        let mut writer = Writer::new();
        header.write(&mut writer);
        let bytes = writer.into_bytes();
        let mut reader = Reader::new("test", &bytes);
        let parsed = PartHeader::parse(&mut reader).expect("just written");
        prop_assert_eq!(reader.left(), 0);
        let PartHeaderBytes { quantizer, entropy_model, metadata } = parsed.cost;
        prop_assert_eq!(quantizer + entropy_model + metadata, bytes.len() as u64);
        prop_assert_eq!(PartHeader { cost: PartHeaderBytes::default(), ..parsed }, header);
    }

    #[test]
    fn no_bytes_make_a_header_panic(bytes: Vec<u8>) {
        let _ = PartHeader::parse(&mut Reader::new("test", &bytes));
    }
}
