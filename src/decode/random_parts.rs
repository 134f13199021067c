//! Parts that no encoder would write: every field of their headers drawn at random, the symbols too, for tests that compare
//! engines.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::{DecodeError, Engine, Pools, PreparedPart, StripJob};
use crate::codec::entropy::{CodingTable, STATE_LOW};
use crate::codec::integers;
use crate::codec::motion::Motion;
use crate::codec::predictor::network::Network;
use crate::codec::quantizer::join_code;
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::format::limits::TRELLIS_STATE_BITS;
use crate::format::network::{Requantization, StoredHidden, StoredKind, StoredMap, StoredNetwork};
use crate::format::part::{
    Carrier, Coding, PartHeader, PartHeaderBytes, QuantizerInfo, StoredPlacement, StoredPrediction, StoredPredictor,
    StoredTrellis, SymbolStreams, TrellisTables,
};
use crate::format::strip::LANES;
use crate::format::table::{Table, first_overfull_bucket};
use crate::format::units::UnitsInfo;
use crate::tensor::{Dtype, TensorInfo};

/// A random part: what its header says, and its strips.
#[derive(Debug)]
pub(super) struct RandomPart {
    tensor: TensorInfo,
    header: PartHeader,
    tables: Vec<Arc<CodingTable>>,
    motion: Option<Motion>,
    pub reference: Option<Vec<u8>>,
    pub body: Vec<u8>,
}

impl RandomPart {
    pub fn prepared(&self) -> PreparedPart {
        let networks = [small_network()];
        let pools = Pools { tables: &self.tables, networks: &networks, ..Pools::default() };
        PreparedPart::new(&self.tensor, &self.header, pools, self.motion.clone()).expect("a sound header")
    }

    /// Changes bytes and states the checksums of the changed strips, so that engines decode them.
    pub fn damaged(mut self, places: &[(Index, u8)]) -> Self {
        for (place, change) in places {
            let place = place.index(self.body.len());
            self.body[place] ^= change;
        }
        let part = self.prepared();
        for (strip, crc) in self.header.strip_crcs.iter_mut().enumerate() {
            let range = part.strip_range(strip);
            *crc = crc32c::crc32c(&self.body[range.start as usize..range.end as usize]);
        }
        self
    }
}

/// A network for units of eleven elements.
fn small_network() -> Arc<Network> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut map = |rows: usize, columns: usize| StoredMap {
        weights: (0..rows * columns).map(|_| random.i8(..)).collect(),
        biases: (0..rows).map(|_| random.i32(-999..999)).collect(),
    };
    let requantization = Requantization { multiplier: 40_000, shift: 21 };
    Arc::new(Network::new(StoredNetwork {
        unit: 11,
        contexts: 1,
        width: 6,
        to_latent: requantization,
        hidden: Some(StoredHidden {
            up: map(9, 6),
            to_hidden: requantization,
            activation: (-128..=127).collect(),
            down: map(6, 9),
            to_latent: requantization,
        }),
        kinds: vec![StoredKind { input: map(6, 11), output: map(11, 6) }],
        layers: vec![],
    }))
}

/// Tables that keep the depth rule: a few codes, or many.
fn table(random: &mut fastrand::Rng, codes_from: i16) -> CodingTable {
    loop {
        let positions = random.usize(2..=61);
        let most = if random.bool() { 60 } else { 4096 / positions as u16 };
        let mut frequencies: Vec<u16> = (0..positions).map(|_| random.u16(1..=most)).collect();
        let sum: u16 = frequencies.iter().sum();
        let Some(rest) = 4096_u16.checked_sub(sum) else { continue };
        frequencies[positions - 1] += rest;
        if first_overfull_bucket(&frequencies).is_some() || frequencies.iter().any(|&slots| slots > 4095) {
            continue;
        }
        let mut codes: Vec<i16> = (codes_from..).take(positions).collect();
        random.shuffle(&mut codes);
        let point_offsets = if random.bool() { (0..positions).map(|_| random.i8(..)).collect() } else { Vec::new() };
        return CodingTable::new(Table { codes, frequencies, point_offsets });
    }
}

/// The lanes' encoder, spelled out because trellis-coded symbols choose a table each.
fn encode(symbols: &[(u8, &CodingTable)], run_elements: usize, lanes: usize) -> Vec<u8> {
    let mut states = vec![STATE_LOW; lanes];
    let mut words = Vec::new();
    for run_symbols in symbols.chunks(run_elements).rev() {
        for (index, &(position, table)) in run_symbols.iter().enumerate().rev() {
            let state = &mut states[index % lanes];
            let (start, slots) = table.interval(position);
            if *state >= slots << 20 {
                words.push(*state as u16);
                *state >>= 16;
            }
            *state = (*state / slots) << 12 | (*state % slots + start);
        }
    }
    let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    bytes.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    bytes
}

fn raw_bit_planes(raw: &[u64], raw_bits: u32, zeros: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let stored: Vec<u64> = raw.iter().map(|raw| raw >> zeros).collect();
    let raw_bits = raw_bits - zeros;
    for plane in 0..raw_bits / 8 {
        bytes.extend(stored.iter().map(|&raw| (raw >> (8 * plane)) as u8));
    }
    for vector in stored.chunks(LANES) {
        for bit in raw_bits / 8 * 8..raw_bits {
            let word = vector.iter().enumerate().fold(0, |word, (lane, raw)| word | ((raw >> bit & 1) as u32) << lane);
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

/// What to make a part of.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    pub dtype: Dtype,
    pub coding: Kind,
    pub rows: usize,
    pub columns: usize,
    /// Runs of this many elements, where they are not rows.
    pub run_elements: Option<usize>,
    pub runs_per_strip: usize,
    pub lanes: usize,
    pub exceptions: bool,
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Predicted {
    Copied,
    Affine,
    Vectors,
    Network,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Split(Carrier, u8),
    Units {
        unit_bits: u8,
        raw_bits: u8,
        values: usize,
        has_differences: bool,
    },
    Quantized {
        raw_bits: u8,
        trellis: Option<StoredTrellis>,
        prediction: Option<Predicted>,
        motion_axis: Option<u8>,
        sides: bool,
        has_column_scales: bool,
    },
}

pub(super) fn recipes() -> impl Strategy<Value = Recipe> {
    let own = [(Dtype::BF16, 16), (Dtype::F16, 16), (Dtype::F32, 32), (Dtype::F64, 56), (Dtype::F8_E4M3, 8)];
    let own = (select(own.to_vec()), 1_u8..=56)
        .prop_map(|((dtype, most), raw)| (dtype, Kind::Split(Carrier::Own, 1 + (raw - 1) % most)));
    let whole_bytes = Just((Dtype::BF16, Kind::Split(Carrier::Own, 8)));
    let carried = (select(vec![Carrier::Bf16, Carrier::F16]), 1_u8..=16)
        .prop_map(|(carrier, raw)| (Dtype::F32, Kind::Split(carrier, raw)));
    let tables = select(vec![TrellisTables::Shared, TrellisTables::Pairs]);
    let trellis = (tables, TRELLIS_STATE_BITS).prop_map(|(tables, state_bits)| StoredTrellis { tables, state_bits });
    let trellis = prop::option::of(trellis);
    use Predicted::{Affine, Copied, Network, Vectors};
    let prediction = select(vec![None, Some(Copied), Some(Affine), Some(Vectors), Some(Network)]);
    let prediction = (prediction, select(vec![None, Some(0_u8), Some(1)]));
    let quantized = (
        select(vec![Dtype::BF16, Dtype::F16, Dtype::F32]),
        select(vec![0_u8, 0, 0, 1, 3, 8]),
        trellis,
        prediction,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(dtype, raw_bits, trellis, (prediction, motion_axis), sides, has_column_scales)| {
            (dtype, Kind::Quantized { raw_bits, trellis, prediction, motion_axis, sides, has_column_scales })
        });
    let units = (select(vec![4_u8, 4, 8, 8, 16, 32, 64]), 0_u8..=56, select(vec![0_usize, 0, 1, 7, 61]), 0..4)
        .prop_map(|(unit_bits, raw_bits, values, differences)| {
            let raw_bits = if values > 0 { 0 } else { raw_bits % unit_bits.min(57) };
            (Dtype::U8, Kind::Units { unit_bits, raw_bits, values, has_differences: differences == 0 })
        });
    let kinds = prop_oneof![2 => own, 1 => whole_bytes, 2 => carried, 6 => quantized, 3 => units];
    let columns = prop_oneof![1_usize..300, select(vec![32_usize, 64, 256, 2000])];
    let run_elements = prop_oneof![3 => Just(None), 1 => (1_usize..700).prop_map(Some)];
    (kinds, 1_usize..40, columns, run_elements, (1_usize..12, 0..12), any::<bool>(), any::<u64>()).prop_map(
        |((dtype, coding), rows, columns, run_elements, (runs_per_strip, lane_bits), exceptions, seed)| {
            let lanes = if lane_bits > 5 { LANES } else { 1_usize << lane_bits };
            let runs_per_strip = runs_per_strip.min(65_536 / run_elements.unwrap_or(columns));
            Recipe { dtype, coding, rows, columns, run_elements, runs_per_strip, lanes, exceptions, seed }
        },
    )
}

impl Recipe {
    pub fn make(&self) -> RandomPart {
        let random = &mut fastrand::Rng::with_seed(self.seed);
        // Runs of units have whole bytes.
        let pairs = if matches!(self.coding, Kind::Units { unit_bits: 4, .. }) { 2 } else { 1 };
        let elements = self.rows * self.columns * pairs;
        let element_bytes = self.dtype.bits().expect("a known type") as usize / 8;
        let run_elements = self.run_elements.unwrap_or(self.columns) * pairs;
        let runs = elements.div_ceil(run_elements);
        let (raw_bits, value_bytes, trellis) = match self.coding {
            Kind::Split(carrier, raw_bits) => (raw_bits, if carrier == Carrier::Own { element_bytes } else { 2 }, None),
            Kind::Units { unit_bits, raw_bits, .. } => (raw_bits, usize::from(unit_bits.div_ceil(8)), None),
            Kind::Quantized { raw_bits, trellis, .. } => (raw_bits, 2, trellis),
        };
        let per_number = if trellis.is_some_and(|trellis| trellis.tables == TrellisTables::Pairs) { 2 } else { 1 };
        let numbers = random.usize(1..4);
        let codes_from = if matches!(self.coding, Kind::Split(..)) { 0 } else { -30 };
        let tables: Vec<_> = (0..numbers * per_number).map(|_| Arc::new(table(random, codes_from))).collect();
        let table_of_run: Vec<i32> = (0..runs).map(|_| random.i32(0..numbers as i32)).collect();

        let is_split = matches!(self.coding, Kind::Split(..));
        let has_zero_bits = is_split && self.exceptions && random.bool();
        let zeros = if has_zero_bits { i32::from(raw_bits) } else { 1 };
        let zero_bits: Vec<i32> = (0..runs).map(|_| random.i32(0..zeros)).collect();

        let (mut words, mut exceptions, mut body, mut strip_crcs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for first in (0..elements).step_by(run_elements * self.runs_per_strip) {
            let symbols = (elements - first).min(run_elements * self.runs_per_strip);
            let raw: Vec<u64> = (0..symbols).map(|_| random.u64(..) & ((1 << raw_bits) - 1)).collect();
            let mut states = [0; LANES];
            let coded: Vec<(u8, &CodingTable)> = (0..symbols)
                .map(|index| {
                    let number = table_of_run[(first + index) / run_elements] as usize * per_number;
                    let state = &mut states[index % run_elements % self.lanes];
                    let table = &tables[number + usize::from(quantizer_of(*state)) % per_number];
                    let position = table.position_of_slot(random.u32(..4096));
                    if let Some(stored) = trellis {
                        let trellis = Trellis::new(stored.state_bits).expect("in range");
                        let code = join_code(table.code(position), raw[index] as u32, raw_bits.into());
                        *state = trellis.next_state(*state, multiple(code, quantizer_of(*state)));
                    }
                    (position, &**table)
                })
                .collect();
            let mut strip = encode(&coded, run_elements, self.lanes);
            words.push((strip.len() - 4 * self.lanes) as i32 / 2);
            for (run, raw) in raw.chunks(run_elements).enumerate() {
                strip.extend(raw_bit_planes(raw, raw_bits.into(), zero_bits[first / run_elements + run] as u32));
            }
            let excepted: Vec<usize> = (0..symbols).filter(|_| self.exceptions && random.u8(..) < 5).collect();
            exceptions.push(excepted.len() as i32);
            strip.extend(excepted.iter().flat_map(|&index| (index as u16).to_le_bytes()));
            strip.extend((0..excepted.len() * value_bytes).map(|_| random.u8(..)));
            strip_crcs.push(crc32c::crc32c(&strip));
            body.extend(strip);
        }

        let mut motion = None;
        let coding = match self.coding {
            Kind::Split(carrier, raw_bits) => {
                let zero_bits = has_zero_bits.then(|| integers::encode(&zero_bits));
                Coding::Split { carrier, raw_bits, zero_bits }
            }
            Kind::Units { unit_bits, raw_bits, values, has_differences } => {
                let values = (0..values).map(|_| random.u64(..) >> (64 - unit_bits)).collect();
                Coding::Units(UnitsInfo { unit_bits, raw_bits, has_differences, values })
            }
            Kind::Quantized { raw_bits, trellis, prediction, motion_axis, sides, has_column_scales } => {
                let mut each =
                    |low, high| integers::encode(&(0..runs).map(|_| random.i32(low..high)).collect::<Vec<_>>());
                let scales = sides.then(|| each(-20, 20));
                let means = sides.then(|| (0.001, each(-9, 9)));
                let column_scales = has_column_scales.then(|| {
                    integers::encode(&(0..run_elements).map(|column| column as i32 * 7 % 41 - 20).collect::<Vec<_>>())
                });
                let predictor = prediction.map(|predicted| match predicted {
                    Predicted::Copied => StoredPredictor::ScaledCopy { gain: 0.7 },
                    Predicted::Affine => StoredPredictor::RowAffine {
                        gain_step: 0.01,
                        offset_step: 0.003,
                        gains: each(-100, 100),
                        offsets: each(-5, 5),
                    },
                    Predicted::Vectors => {
                        let axis = motion_axis.unwrap_or(0);
                        let units = [self.rows, self.columns][usize::from(axis)];
                        let mut random = fastrand::Rng::with_seed(self.seed);
                        let mut each = |count, most| {
                            let numbers: Vec<i32> = (0..count).map(|_| random.i32(0..=most)).collect();
                            (numbers.iter().sum::<i32>() as usize, integers::encode(&numbers))
                        };
                        let (vectors, counts) = each(units, 4);
                        let (_, sources) = each(vectors, units as i32 - 1);
                        let (_, gains) = each(vectors, 20);
                        StoredPredictor::MotionVectors { axis, gain_step: -0.06, counts, sources, gains }
                    }
                    Predicted::Network => StoredPredictor::Network {
                        network: 0,
                        kind: 0,
                        layer: None,
                        input_scale: 300.0,
                        output_scale: 1e-5,
                        second_part: None,
                    },
                });
                let prediction = predictor.map(|predictor| {
                    let is_vectors = matches!(predictor, StoredPredictor::MotionVectors { .. });
                    let placement = (motion_axis.filter(|_| !is_vectors)).map(|axis| StoredPlacement {
                        axis,
                        repeat: 1,
                        per_member: true,
                        unit: 1,
                    });
                    StoredPrediction { reference_part: 0, placement, predictor }
                });
                if let Some(axis) = motion_axis {
                    let shape = [self.rows, self.columns];
                    let mut source: Vec<u32> = (0..shape[usize::from(axis)] as u32).collect();
                    random.shuffle(&mut source);
                    motion = Motion::new(&shape.map(|length| length as u64), axis.into(), source);
                }
                Coding::Quantized(QuantizerInfo {
                    step: 0.013,
                    raw_bits,
                    trellis,
                    vectors: None,
                    scales,
                    means,
                    column_scales,
                    prediction,
                })
            }
        };
        let is_predicted = matches!(self.coding, Kind::Quantized { prediction: Some(_), .. });
        let (shape, length_bytes) = match self.coding {
            Kind::Units { unit_bits, .. } => {
                let bytes = (elements * usize::from(unit_bits) / 8) as u64;
                (vec![bytes], bytes)
            }
            _ => (vec![self.rows as u64, self.columns as u64], (elements * element_bytes) as u64),
        };
        let reference = is_predicted.then(|| (0..elements * element_bytes).map(|_| random.u8(..)).collect());
        RandomPart {
            tensor: TensorInfo {
                name: "weight".into(),
                dtype: self.dtype.clone(),
                shape,
                offset_bytes: 0,
                length_bytes,
            },
            header: PartHeader {
                coding,
                streams: Some(SymbolStreams {
                    run_elements: run_elements as u32,
                    runs_per_strip: self.runs_per_strip as u32,
                    lanes: self.lanes as u8,
                    tables: (0..tables.len() as u16).collect(),
                    table_of_run: integers::encode(&table_of_run),
                    strip_words: integers::encode(&words),
                    strip_exceptions: integers::encode(&exceptions),
                }),
                strip_crcs,
                cost: PartHeaderBytes::default(),
            },
            tables,
            motion,
            reference,
            body,
        }
    }
}

/// Every strip on its own, so that one error does not hide another.
pub(super) fn decode_each(engine: &dyn Engine, random: &RandomPart) -> Vec<Result<Vec<u8>, DecodeError>> {
    let part = random.prepared();
    (0..part.strips())
        .map(|strip| {
            let range = part.strip_range(strip);
            let mut out = vec![0xa5; part.strip_output_bytes(strip)];
            let stored = &random.body[range.start as usize..range.end as usize];
            engine.decode_strip(&part, strip, stored, random.reference.as_deref(), &mut out).map(|()| out)
        })
        .collect()
}

/// All strips in one call, each with what follows it in the file.
pub(super) fn decode_together(engine: &dyn Engine, random: &RandomPart) -> Result<Vec<u8>, DecodeError> {
    let part = random.prepared();
    let mut out = vec![0xa5; part.length_bytes() as usize];
    let mut jobs: Vec<StripJob<'_>> = out
        .chunks_mut(part.full_strip_output_bytes() as usize)
        .enumerate()
        .map(|(strip, out)| StripJob { strip, stored: &random.body[part.strip_range(strip).start as usize..], out })
        .collect();
    engine.decode_strips(&part, random.reference.as_deref(), &mut jobs)?;
    Ok(out)
}

/// Joins what all must have succeeded.
pub(super) trait ConcatAll {
    fn concat_all(self) -> Vec<u8>;
}

impl ConcatAll for Vec<Result<Vec<u8>, DecodeError>> {
    fn concat_all(self) -> Vec<u8> {
        self.into_iter().flat_map(|strip| strip.expect("a sound strip")).collect()
    }
}
