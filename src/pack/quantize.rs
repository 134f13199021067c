//! Which tensors are quantized, how finely, and with what symbols (section 6.1, Appendix A).

use rayon::prelude::*;

use super::counting::sum_of_squares;
use super::entropy_model::{FittedTable, OwnTable};
use super::histogram::{EXCEPTION_BITS, Histogram};
use super::options::{ColumnScales, PackOptions, Steps};
use super::quantized_symbols::Rounding;
use super::symbols::RunLayout;
use crate::codec::architecture::BlockType;
use crate::codec::integers;
use crate::codec::quantizer::{SCALE_RANGE, scale_multiplier};
use crate::format::part::{QuantizerInfo, StoredVectors, TrellisTables};
use crate::numerics::{f32_from_bf16, f32_from_f16, nearest_integer};
use crate::tensor::{Dtype, TensorInfo};

/// Smaller tensors are carried bit-exact: they cost little and steer much. Lower than that a small model's projections would
/// stay bit-exact and be a third of its archive.
const LEAST_ELEMENTS: u64 = 1024;
/// Steps from zero to the largest value that is quantized: what an exception's 16 bits hold.
pub const LARGEST_CODE: f32 = 32_000.0;
/// Elements converted to binary32 at once.
const CONVERTED_ELEMENTS: usize = 1 << 15;
/// Root mean square of a part's values in steps, up to which the two quantizers of the trellis have tables of their own: 0.04 bit
/// less at 1.3 bits, no less from 2 bits on, where the search makes do with one table.
const PAIRED_TABLES_REACH: f64 = 1.6;
/// Codes from the centre to the last coded position of a table.
const TABLE_REACH: i32 = 30;
/// Most raw bits below a symbol.
const MOST_RAW_BITS: u32 = 8;
/// What raw bits cost besides themselves: no reconstruction points, and less choice for the search.
const RAW_BITS_COST: f64 = 0.02;
/// A symbol that takes more has not enough raw bits below it.
const MOST_SYMBOL_BITS: f64 = 7.0;

/// Whether a tensor may be quantized: a matrix of weights of a float type, not a norm, bias, router or small tensor.
pub fn may_be_quantized(tensor: &TensorInfo) -> bool {
    let weights = matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let matrix = tensor.shape.iter().filter(|&&dimension| dimension > 1).count() >= 2;
    weights && matrix && tensor.elements() >= LEAST_ELEMENTS && !is_router(&tensor.name)
}

/// Routers of mixtures of experts: a wrong choice of expert is no small error.
fn is_router(name: &str) -> bool {
    name.contains("router") || name.ends_with(".gate.weight")
}

/// How many times finer than the rest a tensor of this block type is quantized.
pub fn refinement(block_type: BlockType, options: &PackOptions) -> f32 {
    match block_type {
        BlockType::Embedding | BlockType::Head => options.embedding_refinement,
        _ => 1.0,
    }
}

/// The elements of a float tensor as binary32.
///
/// Panics for other types: [`may_be_quantized`] has been asked.
pub fn values_of(dtype: &Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => converted(bytes, f32::from_le_bytes),
        Dtype::F16 => converted(bytes, |element| f32_from_f16(u16::from_le_bytes(element))),
        Dtype::BF16 => converted(bytes, |element| f32_from_bf16(u16::from_le_bytes(element))),
        other => panic!("{other} tensors are not quantized"),
    }
}

fn converted<const BYTES: usize>(bytes: &[u8], value: impl Fn([u8; BYTES]) -> f32 + Sync) -> Vec<f32> {
    let elements = bytes.as_chunks().0;
    let mut values = vec![0.0; elements.len()];
    // Piece by piece: loops over slices become vector instructions, parallel iterators over elements do not.
    values.par_chunks_mut(CONVERTED_ELEMENTS).zip(elements.par_chunks(CONVERTED_ELEMENTS)).for_each(
        |(values, elements)| {
            for (place, &element) in values.iter_mut().zip(elements) {
                *place = value(element);
            }
        },
    );
    values
}

/// Step, raw bits and rounding of a part, chosen from a sample of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizerChoice {
    /// Step of a run with multiplier 1, in weight units.
    pub step: f32,
    /// Raw bits per symbol.
    pub raw_bits: u32,
    /// How values become codes.
    pub rounding: Rounding,
    /// Root mean square of the whole part; runs have scales relative to it.
    pub root_mean_square: f64,
    /// Codebooks of the encoder's pool, where vectors are quantized: then steps follow the runs' scales.
    pub vectors: Option<[u16; 2]>,
}

/// The quantizer of one part.
#[derive(Clone, Debug)]
pub struct PartQuantizer {
    /// Step, raw bits and rounding.
    pub choice: QuantizerChoice,
    /// Scale integer of each run, where steps follow the runs' scales.
    pub scales: Option<Vec<i32>>,
    /// Scale integer of each column, where steps follow them.
    pub column_scales: Option<Vec<i32>>,
}

impl PartQuantizer {
    /// The quantizer with the given step for values like these, whose part has this root mean square. `None` if it would take
    /// more raw bits than there are, or a step that is no normal number: such a part is carried bit-exact.
    pub fn choose(
        values: &[f32],
        layout: RunLayout,
        step: f32,
        root_mean_square: f64,
        own_table: Option<OwnTable>,
        options: &PackOptions,
    ) -> Option<Self> {
        if step.is_nan() || step < f32::MIN_POSITIVE || values.is_empty() {
            return None;
        }
        let rounding = rounding_at_scale(Rounding { own_table, ..options.rounding() }, root_mean_square, step);
        let choice = QuantizerChoice { step, raw_bits: 0, rounding, root_mean_square, vectors: None };
        let mut quantizer = Self::new(choice, values, layout, options);
        // Codes of the trellis are two steps apart.
        let code_steps = if rounding.trellis.is_some() { 2.0 } else { 1.0 };
        if !quantizer.holds(values, layout) {
            return None;
        }
        let columns = quantizer.column_multipliers();
        let mut codes: Vec<i32> = Vec::with_capacity(values.len());
        for (run, values) in values.chunks(layout.run_elements).enumerate() {
            let step = quantizer.step_of_run(run) * code_steps;
            codes.extend(values.iter().enumerate().map(|(column, value)| {
                nearest_integer(value / (step * columns.as_ref().map_or(1.0, |columns| columns[column])))
            }));
        }
        let counted = Histogram::of(&codes);
        let fixed_length = own_table.is_some_and(|table| table.fixed_length);
        let bits = |raw_bits: u32| estimated_bits(&counted, raw_bits, fixed_length);
        quantizer.choice.raw_bits = (0..=MOST_RAW_BITS).min_by(|&a, &b| bits(a).total_cmp(&bits(b)))?;
        // Of a tensor that even so has many values beyond its tables' reach, the mantissas are as short bit-exact.
        let reach = bits(quantizer.choice.raw_bits);
        (reach < f64::from(quantizer.choice.raw_bits) + MOST_SYMBOL_BITS).then_some(quantizer)
    }

    /// The quantizer of a part whose choice is made.
    pub fn new(choice: QuantizerChoice, values: &[f32], layout: RunLayout, options: &PackOptions) -> Self {
        let column_scales = (options.column_scales == ColumnScales::Energy && choice.vectors.is_none())
            .then(|| energy_scales(values, layout.run_elements));
        if options.steps == Steps::Shared && choice.vectors.is_none() {
            return Self { choice, scales: None, column_scales };
        }
        let rms = choice.root_mean_square.max(f64::from(f32::MIN_POSITIVE));
        let scale_of = |run: usize| {
            let octaves = (root_mean_square(&values[layout.run_range(run)]) / rms).log2();
            (8.0 * octaves).round().clamp(-160.0, 160.0) as i32 // 20 octaves from the average: a row of zeros
        };
        let scales: Vec<i32> = (0..layout.runs()).into_par_iter().map(scale_of).collect();
        debug_assert!(scales.iter().all(|scale| (SCALE_RANGE.0..=SCALE_RANGE.1).contains(scale)));
        // The finest step must stay a normal number.
        let step = choice.step.max(f32::MIN_POSITIVE * 2.0_f32.powi(24));
        Self { choice: QuantizerChoice { step, ..choice }, scales: Some(scales), column_scales }
    }

    /// The same with another step, and scales of the columns.
    #[must_use]
    pub fn with_columns(self, step: f32, column_scales: Vec<i32>) -> Self {
        Self { choice: QuantizerChoice { step, ..self.choice }, column_scales: Some(column_scales), ..self }
    }

    /// Whether every value has a code.
    pub fn holds(&self, values: &[f32], layout: RunLayout) -> bool {
        if self.choice.vectors.is_some() {
            return largest_magnitude(values).is_finite();
        }
        let columns = self.column_multipliers();
        let largest = |values: &[f32]| match &columns {
            Some(columns) => {
                let scaled: Vec<f32> = values.iter().zip(columns).map(|(value, column)| value / column).collect();
                largest_magnitude(&scaled)
            }
            None => largest_magnitude(values),
        };
        let most = (values.par_chunks(layout.run_elements).enumerate())
            .map(|(run, values)| largest(values) / self.step_of_run(run))
            .reduce(|| 0.0, f32::max);
        most < LARGEST_CODE
    }

    /// What each column multiplies the step by, where columns have scales.
    pub fn column_multipliers(&self) -> Option<Vec<f32>> {
        let scales = self.column_scales.as_ref()?;
        Some(scales.iter().map(|&scale| scale_multiplier(scale)).collect())
    }

    /// Step of a run.
    pub fn step_of_run(&self, run: usize) -> f32 {
        let step = self.choice.step;
        self.scales.as_ref().map_or(step, |scales| step * scale_multiplier(scales[run]))
    }

    /// The mean square of what columns multiply the step by.
    pub fn mean_column_square(&self) -> f64 {
        let Some(columns) = self.column_multipliers() else { return 1.0 };
        sum_of_squares(&columns) / columns.len().max(1) as f64
    }

    /// The finest step of any element.
    pub fn least_step(&self) -> f32 {
        let least =
            |scales: &Option<Vec<i32>>| scales.iter().flatten().min().map_or(1.0, |&scale| scale_multiplier(scale));
        self.choice.step * least(&self.scales) * least(&self.column_scales)
    }

    /// What the part's header says of it, prediction left open.
    pub fn info(&self) -> QuantizerInfo {
        QuantizerInfo {
            step: self.choice.step,
            raw_bits: self.choice.raw_bits as u8,
            trellis: self.choice.rounding.trellis,
            vectors: self.choice.vectors.map(|codebooks| StoredVectors { codebooks }),
            scales: self.scales.as_ref().map(|scales| integers::encode(scales)),
            means: None,
            column_scales: self.column_scales.as_ref().map(|scales| integers::encode(scales)),
            prediction: None,
        }
    }
}

/// Scale integers of columns in proportion to their root mean squares, within three octaves; their mean is none.
fn energy_scales(values: &[f32], columns: usize) -> Vec<i32> {
    let mut squares = vec![0.0_f64; columns];
    for values in values.chunks(columns) {
        for (square, &value) in squares.iter_mut().zip(values) {
            *square += f64::from(value).powi(2);
        }
    }
    let octaves: Vec<f64> = squares.iter().map(|square| 0.5 * square.max(f64::MIN_POSITIVE).log2()).collect();
    let mean = octaves.iter().sum::<f64>() / columns as f64;
    octaves.iter().map(|octaves| (8.0 * (octaves - mean)).round().clamp(-24.0, 24.0) as i32).collect()
}

/// The rounding for values of this root mean square: whether the trellis' quantizers have tables of their own is a matter of
/// scale. `rounding` is what the options allow.
pub fn rounding_at_scale(mut rounding: Rounding, root_mean_square: f64, step: f32) -> Rounding {
    if let Some(trellis) = &mut rounding.trellis
        && root_mean_square > PAIRED_TABLES_REACH * f64::from(step)
    {
        trellis.tables = TrellisTables::Shared;
    }
    rounding
}

/// Bits of a symbol with so many raw bits below it, all runs taken together: enough to compare numbers of raw bits.
fn estimated_bits(codes: &Histogram, raw_bits: u32, fixed_length: bool) -> f64 {
    if fixed_length {
        let shifted = codes.occurring().fold(Histogram::default(), |mut shifted, (code, count)| {
            shifted.merge(&Histogram::of(&[code >> raw_bits]), count);
            shifted
        });
        let table = shifted.fit_fixed_length(false);
        return f64::from(raw_bits)
            + table.map_or(0.0, |table| FittedTable::new(table).cost(&shifted) / codes.symbols() as f64);
    }
    let mut inside = [0_u64; 2 * TABLE_REACH as usize + 1];
    let mut outside = 0;
    for (code, count) in codes.occurring() {
        match inside.get_mut(((code >> raw_bits) + TABLE_REACH) as usize) {
            Some(slot) => *slot += count,
            None => outside += count,
        }
    }
    let total = codes.symbols() as f64;
    let entropy = |count: &u64| -(*count as f64 / total) * (*count as f64 / total).log2();
    let symbols: f64 = inside.iter().filter(|&&count| count > 0).map(entropy).sum();
    let rounding = if raw_bits > 0 { RAW_BITS_COST } else { 0.0 };
    symbols + f64::from(raw_bits) + rounding + EXCEPTION_BITS * outside as f64 / total
}

/// The largest magnitude, 0 for no values; infinite where a value is not finite.
pub fn largest_magnitude(values: &[f32]) -> f32 {
    let magnitude = |value: &f32| if value.is_finite() { value.abs() } else { f32::INFINITY };
    values.iter().map(magnitude).fold(0.0, f32::max)
}

/// Root of the mean square, 0 for no values.
pub fn root_mean_square(values: &[f32]) -> f64 {
    (sum_of_squares(values) / values.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> TensorInfo {
        let length_bytes = shape.iter().product::<u64>() * dtype.bits().unwrap_or(8) / 8;
        TensorInfo { name: name.into(), dtype, shape: shape.into(), offset_bytes: 0, length_bytes }
    }

    #[test]
    fn only_matrices_of_float_weights_are_quantized() {
        assert!(may_be_quantized(&tensor("layer.0.weight", Dtype::F32, &[64, 64])));
        assert!(!may_be_quantized(&tensor("norm.weight", Dtype::F32, &[8192])));
        assert!(!may_be_quantized(&tensor("norm.weight", Dtype::F32, &[1, 8192, 1])));
        assert!(!may_be_quantized(&tensor("layer.0.qweight", Dtype::I32, &[64, 64])));
        assert!(!may_be_quantized(&tensor("layer.0.weight", Dtype::F8_E4M3, &[64, 64])));
        assert!(!may_be_quantized(&tensor("layers.0.mlp.gate.weight", Dtype::BF16, &[64, 64])));
        assert!(!may_be_quantized(&tensor("type_embeddings", Dtype::F32, &[2, 384])));
    }

    fn choose(values: &[f32], step: f32) -> Option<PartQuantizer> {
        let layout = RunLayout::of_shape(&[64, 64], None);
        PartQuantizer::choose(values, layout, step, root_mean_square(values), None, &PackOptions::default())
    }

    #[test]
    fn steps_too_fine_are_refused() {
        assert!(choose(&[0.25; 4096], 0.01).is_some());
        assert!(choose(&[0.25; 4096], 1e-7).is_none());
        assert!(choose(&[0.25; 4096], f32::NAN).is_none());
    }

    #[test]
    fn infinite_values_and_values_beyond_all_codes_are_not_held() {
        let layout = RunLayout::of_shape(&[64, 64], None);
        let mut values = vec![0.25; 4096];
        let quantizer = choose(&values, 0.01).expect("ordinary values");
        assert!(quantizer.holds(&values, layout));
        for outlier in [f32::INFINITY, f32::NAN, -400.0] {
            values[7] = outlier;
            assert!(!quantizer.holds(&values, layout), "{outlier}");
        }
    }

    #[test]
    fn raw_bits_let_a_fine_step_fit_its_table() {
        let values: Vec<f32> = (0..4096).map(|index| index as f32 / 4096.0 - 0.5).collect();
        let quantizer = choose(&values, 0.001).expect("it fits");
        assert_eq!(quantizer.choice.raw_bits, 4, "250 codes on each side are 16 times 16");
    }
}
