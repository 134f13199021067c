//! Quantized values and residuals as symbols (section 6.1): which code each gets, given what codes cost.

use std::ops::Range;

use ndarray::{Array2, s};

use super::calibration::feedback::ColumnFeedback;
use super::entropy_model::{FittedTable, OwnTable, StreamKind};
use super::histogram::Histogram;
use super::symbols::{Placed, RunLayout, Symbols};
use super::trellis_search::Search;
use super::trellis_search::feedback::{BEYOND_REACH, LaneColumns};
use crate::codec::predictor::RunPredictor;
use crate::codec::quantizer::split_code;
use crate::codec::trellis::Trellis;
use crate::format::part::{StoredTrellis, TrellisTables};
use crate::numerics::nearest_integer;

/// How values become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// Trellis-coded, else scalar.
    pub trellis: Option<StoredTrellis>,
    /// What a bit is worth in squared steps; 0 rounds to the nearest.
    pub lambda: f32,
    /// Present where the part has one entropy table to itself.
    pub own_table: Option<OwnTable>,
}

impl Rounding {
    /// Which tables fit codes with so many raw bits; of the trellis, the first quantizer's.
    pub fn kind(self, raw_bits: u32) -> StreamKind {
        let (raw_bits, own) = (raw_bits as u8, self.own_table);
        match self.trellis.is_some() {
            true => StreamKind::Trellis { raw_bits, quantizer: 0, own },
            false => StreamKind::Quantized { raw_bits, own },
        }
    }
}

/// What a predicted part subtracts before it quantizes.
#[derive(Clone, Copy)]
pub struct EncoderPrediction<'a> {
    /// Decoded reference value of every element, motion already applied.
    pub reference: &'a [f32],
    /// The predictor of each run.
    pub of_run: &'a (dyn Fn(usize) -> RunPredictor + Sync),
}

/// Quantized values or residuals, see `codec::quantizer`.
#[derive(Clone, Copy)]
pub struct QuantizedSymbols<'a> {
    /// The weights.
    pub values: &'a [f32],
    /// What they are predicted from.
    pub prediction: Option<EncoderPrediction<'a>>,
    /// Layout of the runs.
    pub layout: RunLayout,
    /// Step of each run, in weight units.
    pub step_of_run: &'a (dyn Fn(usize) -> f32 + Sync),
    /// Raw bits per symbol.
    pub raw_bits: u32,
    /// Scalar or trellis-coded, and how much a bit is worth.
    pub rounding: Rounding,
    /// Where columns have scales, what each multiplies the step by: `[run elements]`.
    pub columns: Option<&'a [f32]>,
    /// How errors of columns move others, in steps of theirs, where runs are rows and calibration knows their inputs.
    pub feedback: Option<&'a ColumnFeedback>,
}

impl QuantizedSymbols<'_> {
    /// Adds every value or residual of a run, in steps.
    pub fn targets(&self, run: usize, targets: &mut Vec<f32>) {
        let steps_per_unit = 1.0 / (self.step_of_run)(run);
        let range = self.layout.run_range(run);
        let values = &self.values[range.clone()];
        let start = targets.len();
        match &self.prediction {
            None => targets.extend(values.iter().map(|value| value * steps_per_unit)),
            Some(prediction) => {
                let predictor = (prediction.of_run)(run);
                let residuals = (values.iter().zip(&prediction.reference[range]))
                    .map(|(&value, &reference)| (value - predictor.predict(reference)) * steps_per_unit);
                targets.extend(residuals);
            }
        }
        for (target, column) in targets[start..].iter_mut().zip(self.columns.into_iter().flatten()) {
            *target /= column;
        }
    }

    /// Rate-distortion-optimised rounding: the nearest code, or its neighbour towards zero if that is so much shorter.
    fn place_scalar(&self, targets: &[f32], tables: &[[&FittedTable; 2]]) -> Placed {
        let mut placed = Placed::default();
        for (targets, [table, _]) in targets.chunks(self.layout.run_elements).zip(tables) {
            for &target in targets {
                let cost = |code: i32| {
                    let error = target - code as f32;
                    error * error + self.rounding.lambda * table.bits(code >> self.raw_bits)
                };
                let nearest = nearest_integer(target);
                let shorter = nearest - nearest.signum();
                let code = if self.raw_bits == 0 && cost(shorter) < cost(nearest) { shorter } else { nearest };
                let (symbol, raw) = split_code(code, self.raw_bits);
                let index = placed.positions.len() as u16;
                placed.positions.push(table.position(symbol).unwrap_or_else(|| {
                    placed.exceptions.push((index, exception_of(target).to_le_bytes().to_vec()));
                    table.filler()
                }));
                if self.raw_bits > 0 {
                    placed.raw.push(raw.into());
                }
                placed.symbols.push(symbol);
                placed.offsets.push(target - code as f32);
            }
        }
        placed
    }

    fn place_trellis(&self, targets: &[f32], tables: &[[&FittedTable; 2]], trellis: Trellis) -> Placed {
        let search = Search {
            run_elements: self.layout.run_elements,
            lanes: self.layout.lanes,
            raw_bits: self.raw_bits,
            lambda: self.rounding.lambda,
            trellis,
        };
        if let Some(feedback) = self.feedback {
            let (multiples, exceptions) = search_with_feedback(&search, feedback, targets, tables);
            return self.placed(&multiples, targets, exceptions, tables);
        }
        let multiples = search.multiples(targets, tables);
        let exceptions = (targets.iter().zip(&multiples).enumerate())
            .filter(|(_, (target, multiple))| (*target - **multiple as f32).abs() > BEYOND_REACH)
            .map(|(index, (&target, _))| (index, exception_of(target)))
            .collect();
        self.placed(&multiples, targets, exceptions, tables)
    }

    /// The symbols of these multiples, some of which are exceptions with values of their own.
    fn placed(
        &self,
        multiples: &[i32],
        values: &[f32],
        exceptions: Vec<(usize, i16)>,
        tables: &[[&FittedTable; 2]],
    ) -> Placed {
        let run_elements = self.layout.run_elements;
        let mut placed = Placed {
            quantizers: multiples.iter().map(|&multiple| (multiple & 1) as u8).collect(),
            symbols: multiples.iter().map(|&multiple| multiple >> (1 + self.raw_bits)).collect(),
            offsets: values.iter().zip(multiples).map(|(value, &multiple)| value - multiple as f32).collect(),
            ..Placed::default()
        };
        if self.raw_bits > 0 {
            let raw = |&multiple: &i32| split_code(multiple >> 1, self.raw_bits).1.into();
            placed.raw = multiples.iter().map(raw).collect();
        }
        for (index, exception) in exceptions {
            placed.exceptions.push((index as u16, exception.to_le_bytes().to_vec()));
            placed.offsets[index] = 0.0;
        }
        placed.positions.reserve(multiples.len());
        let of_runs = placed.symbols.chunks(run_elements).zip(placed.quantizers.chunks(run_elements));
        for ((symbols, quantizers), tables) in of_runs.zip(tables) {
            placed.positions.extend(symbols.iter().zip(quantizers).map(|(&symbol, &quantizer)| {
                let position = tables[usize::from(quantizer)].position(symbol);
                position.expect("the search stays inside the table")
            }));
        }
        placed
    }
}

impl Symbols for QuantizedSymbols<'_> {
    fn layout(&self) -> RunLayout {
        self.layout
    }

    fn kind(&self) -> StreamKind {
        self.rounding.kind(self.raw_bits)
    }

    fn second_kind(&self) -> Option<StreamKind> {
        let raw_bits = self.raw_bits as u8;
        self.rounding
            .trellis
            .is_some_and(|trellis| trellis.tables == TrellisTables::Pairs)
            .then_some(StreamKind::Trellis { raw_bits, quantizer: 1, own: self.rounding.own_table })
    }

    fn raw_bits(&self) -> u32 {
        self.raw_bits
    }

    fn nearest(&self, run: usize, symbols: &mut Vec<i32>) {
        let mut targets = Vec::with_capacity(self.layout.run_elements);
        self.targets(run, &mut targets);
        // Of the trellis, the first quantizer stands for both until the search has decided.
        let codes_per_step = if self.rounding.trellis.is_some() { 0.5 } else { 1.0 };
        symbols.extend(targets.iter().map(|&target| nearest_integer(target * codes_per_step) >> self.raw_bits));
    }

    fn class(&self, run: &Histogram) -> i32 {
        if self.rounding.own_table.is_some() {
            return 0;
        }
        let square: f64 = run.occurring().map(|(code, count)| f64::from(code).powi(2) * count as f64).sum();
        let mean_square = square / run.symbols().max(1) as f64;
        (2.0 * (mean_square + 1.0 / 64.0).log2()).round() as i32
    }

    fn unit(&self, run: usize) -> f32 {
        (self.step_of_run)(run)
    }

    fn column_units(&self) -> Option<&[f32]> {
        self.columns
    }

    fn place(&self, runs: Range<usize>, tables: &[[&FittedTable; 2]]) -> Placed {
        let mut targets = Vec::with_capacity(runs.len() * self.layout.run_elements);
        for run in runs {
            self.targets(run, &mut targets);
        }
        match self.rounding.trellis {
            Some(StoredTrellis { state_bits, .. }) => {
                let trellis = Trellis::new(state_bits).expect("options name a trellis there is");
                self.place_trellis(&targets, tables, trellis)
            }
            None => self.place_scalar(&targets, tables),
        }
    }
}

/// An exception's value: the multiple of the step nearest to the target. One beyond 16 bits is cut; tensors that have such
/// values are not quantized.
fn exception_of(target: f32) -> i16 {
    target.round_ties_even().clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

/// The multiples of a strip of whole rows, lane after lane, each moved by the errors of those before; and the exceptions.
fn search_with_feedback(
    search: &Search,
    feedback: &ColumnFeedback,
    values: &[f32],
    tables: &[[&FittedTable; 2]],
) -> (Vec<i32>, Vec<(usize, i16)>) {
    let columns = feedback.order.len();
    let rows = values.len() / columns;
    let mut multiples = vec![0; values.len()];
    let mut exceptions = Vec::new();
    // In the feedback's order of columns.
    let mut errors = Array2::zeros((rows, columns));
    for lane in &feedback.lanes {
        let before = lane.start;
        let moved = errors.slice(s![.., ..before]).dot(&feedback.moves.slice(s![..before, lane.clone()]));
        let places = |index: usize| index / lane.len() * columns + feedback.order[before + index % lane.len()];
        let lane_values: Vec<f32> = (0..rows * lane.len()).map(|index| values[places(index)]).collect();
        let targets: Vec<f32> = lane_values.iter().zip(&moved).map(|(value, moved)| value + moved).collect();
        let within: Vec<f32> = feedback.moves.slice(s![lane.clone(), lane.clone()]).iter().copied().collect();
        let problem = LaneColumns {
            columns: lane.len(),
            values: &lane_values,
            targets: &targets,
            feedback: &within,
            weights: &feedback.weights[lane.clone()],
        };
        let found = search.lane_multiples(&problem, tables);
        for (index, (multiple, error)) in found.multiples.into_iter().zip(found.errors).enumerate() {
            multiples[places(index)] = multiple;
            errors[[index / lane.len(), before + index % lane.len()]] = error;
        }
        exceptions.extend(found.exceptions.into_iter().map(|(index, multiple)| (places(index), multiple)));
    }
    exceptions.sort_unstable();
    (multiples, exceptions)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::codec::entropy::CodingTable;
    use crate::decode::Pools;
    use crate::decode::reference::ReferenceEngine;
    use crate::format::part::{Coding, QuantizerInfo};
    use crate::pack::counting::{count, count_placed};
    use crate::pack::part::EncodedPart;
    use crate::pack::record::decode_part;
    use crate::tensor::{Dtype, TensorInfo};

    /// A deterministic stand-in for weights: sums of hashed uniform numbers, unit variance.
    fn noise(count: usize) -> Vec<f32> {
        let mut state = 7_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..12).map(|_| uniform()).sum()).collect()
    }

    /// Bits and squared error per value of unit-variance noise, through the decoder.
    fn rate_and_error(rounding: Rounding, step: f32) -> (f64, f64) {
        let values = noise(256 * 512);
        let layout = RunLayout::of_shape(&[512, 256], None);
        let step_of_run = |_: usize| step;
        let symbols = QuantizedSymbols {
            values: &values,
            prediction: None,
            layout,
            step_of_run: &step_of_run,
            raw_bits: 0,
            rounding,
            columns: None,
            feedback: None,
        };
        let first = count(&symbols, 1).fit();
        let pool = count_placed(&symbols, &first, &|_| 1).expect("fitted").classes.fit();
        let info = QuantizerInfo {
            step,
            raw_bits: 0,
            trellis: rounding.trellis,
            vectors: None,
            scales: None,
            means: None,
            column_scales: None,
            prediction: None,
        };
        let part = EncodedPart::symbols(Coding::Quantized(info), &symbols, &pool).expect("fitted");
        let shape = vec![512, 256];
        let tensor =
            TensorInfo { name: "noise".into(), dtype: Dtype::F32, shape, offset_bytes: 0, length_bytes: 512 * 1024 };
        let tables: Vec<Arc<CodingTable>> = pool.coding_tables();
        let decoded =
            decode_part(&ReferenceEngine, &tensor, &part, Pools { tables: &tables, ..Pools::default() }, None, None)
                .expect("just encoded");
        let error: f64 = (values.iter().zip(decoded.as_chunks().0))
            .map(|(&value, &bytes)| f64::from(value - f32::from_le_bytes(bytes)).powi(2))
            .sum();
        (8.0 * part.body.len() as f64 / values.len() as f64, error / values.len() as f64)
    }

    #[test]
    fn the_trellis_gains_an_eighth_of_a_bit_at_equal_error() {
        let bits_above_bound = |(bits, error): (f64, f64)| bits + 0.5 * error.log2();
        let scalar = bits_above_bound(rate_and_error(Rounding { trellis: None, lambda: 0.0, own_table: None }, 0.3));
        for (tables, state_bits, gain) in
            [(TrellisTables::Shared, 3, 0.125), (TrellisTables::Pairs, 3, 0.125), (TrellisTables::Shared, 8, 0.16)]
        {
            let rounding =
                Rounding { trellis: Some(StoredTrellis { tables, state_bits }), lambda: 0.2, own_table: None };
            let bits = bits_above_bound(rate_and_error(rounding, 0.18));
            assert!(bits < scalar - gain, "{rounding:?}: {bits} and {scalar} bits above the Gaussian bound");
        }
    }
}
