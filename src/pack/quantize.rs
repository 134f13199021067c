//! Which tensors are quantized, how finely, and with what symbols (section 6.1, Appendix A).

use rayon::prelude::*;

use super::options::{PackOptions, Steps, Target};
use super::part::RunLayout;
use super::quantized_symbols::Rounding;
use crate::codec::architecture::BlockType;
use crate::codec::integers;
use crate::codec::quantizer::{SCALE_RANGE, scale_multiplier};
use crate::format::part::{QuantizerInfo, TrellisTables};
use crate::numerics::{f32_from_bf16, f32_from_f16};
use crate::tensor::{Dtype, TensorInfo};

/// Smaller tensors are carried bit-exact: they cost little and steer much. Lower than that a small model's projections would
/// stay bit-exact and be a third of its archive.
const LEAST_ELEMENTS: u64 = 1024;
/// Elements looked at to bound the codes.
const SAMPLED_ELEMENTS: usize = 1 << 16;
/// Root mean square of a part's values in steps, up to which the two quantizers of the trellis have tables of their own: 0.04 bit
/// less at 1.3 bits, no less from 2 bits on, where the search makes do with one table.
const PAIRED_TABLES_REACH: f64 = 1.6;
/// Codes from the centre to the last coded position of a table.
const TABLE_REACH: f32 = 30.0;

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
        BlockType::Attention | BlockType::Ffn | BlockType::Layer | BlockType::Global => 1.0,
    }
}

/// The elements of a float tensor as binary32.
///
/// Panics for other types: [`may_be_quantized`] has been asked.
pub fn values_of(dtype: &Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.par_iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::F16 => bytes.as_chunks().0.par_iter().map(|&bytes| f32_from_f16(u16::from_le_bytes(bytes))).collect(),
        Dtype::BF16 => bytes.as_chunks().0.par_iter().map(|&bytes| f32_from_bf16(u16::from_le_bytes(bytes))).collect(),
        other => panic!("{other} tensors are not quantized"),
    }
}

/// The quantizer of one part, chosen from its values.
#[derive(Clone, Debug)]
pub struct PartQuantizer {
    /// Step of a run with multiplier 1, in weight units.
    pub step: f32,
    /// Scale integer of each run, where steps follow the runs' scales.
    pub scales: Option<Vec<i32>>,
    /// Raw bits per symbol.
    pub raw_bits: u32,
    /// How values become codes.
    pub rounding: Rounding,
}

impl PartQuantizer {
    /// A quantizer with the given step. `None` if values are not finite or codes would not fit: such a tensor stays
    /// bit-exact.
    pub fn new(values: &[f32], layout: RunLayout, step: f32, options: &PackOptions) -> Option<Self> {
        if step.is_nan() || step < f32::MIN_POSITIVE || !values.par_iter().all(|value| value.is_finite()) {
            return None;
        }
        let mut step = step;
        let mut scales = None;
        if options.steps == Steps::PerRun {
            let rms = root_mean_square(values).max(f64::from(f32::MIN_POSITIVE));
            let scale_of = |run: usize| {
                let octaves = (root_mean_square(&values[layout.run_range(run)]) / rms).log2();
                (8.0 * octaves).round().clamp(-160.0, 160.0) as i32 // 20 octaves from the average: a row of zeros
            };
            let found: Vec<i32> = (0..layout.runs()).into_par_iter().map(scale_of).collect();
            debug_assert!(found.iter().all(|scale| (SCALE_RANGE.0..=SCALE_RANGE.1).contains(scale)));
            // The finest step must stay a normal number.
            step = step.max(f32::MIN_POSITIVE * 2.0_f32.powi(24));
            scales = Some(found);
        }
        let largest = |values: &mut Vec<f32>| {
            let rank = values.len() - 1 - values.len() / 20_000;
            *values.select_nth_unstable_by(rank, f32::total_cmp).1
        };
        let step_of_run = |run: usize| scales.as_ref().map_or(step, |scales| step * scale_multiplier(scales[run]));
        let every = values.len().div_ceil(SAMPLED_ELEMENTS).max(1);
        // An odd stride visits all columns in turn.
        let mut sample: Vec<f32> = (0..values.len())
            .step_by(every | 1)
            .map(|element| (values[element] / step_of_run(element / layout.run_elements)).abs())
            .collect();
        if sample.is_empty() {
            return None;
        }
        let reach = largest(&mut sample);
        let mut rounding = options.rounding();
        if let Some(trellis) = &mut rounding.trellis
            && root_mean_square(values) > PAIRED_TABLES_REACH * f64::from(step)
        {
            trellis.tables = TrellisTables::Shared;
        }
        // Codes of the trellis are two steps apart.
        let code_steps = if rounding.trellis.is_some() { 2.0 } else { 1.0 };
        let raw_bits = (reach / code_steps / TABLE_REACH).log2().ceil().max(0.0) as u32;
        let most = values
            .par_iter()
            .enumerate()
            .map(|(element, value)| (value / step_of_run(element / layout.run_elements)).abs())
            .reduce(|| 0.0, f32::max);
        (raw_bits <= 8 && most < 32_000.0).then_some(Self { step, scales, raw_bits, rounding })
    }

    /// Step of a run.
    pub fn step_of_run(&self, run: usize) -> f32 {
        self.scales.as_ref().map_or(self.step, |scales| self.step * scale_multiplier(scales[run]))
    }

    /// What the part's header says of it, prediction left open.
    pub fn info(&self) -> QuantizerInfo {
        QuantizerInfo {
            step: self.step,
            raw_bits: self.raw_bits as u8,
            trellis: self.rounding.trellis,
            scales: self.scales.as_ref().map(|scales| integers::encode(scales)),
            means: None,
            prediction: None,
        }
    }
}

/// Root of the mean square, 0 for no values.
pub fn root_mean_square(values: &[f32]) -> f64 {
    let square: f64 = values.iter().map(|&value| f64::from(value).powi(2)).sum();
    (square / values.len().max(1) as f64).sqrt()
}

/// Whether the target asks for quantization at all.
pub fn is_lossy(target: Target) -> bool {
    target != Target::Lossless
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

    #[test]
    fn infinite_values_and_steps_too_fine_keep_a_tensor_bit_exact() {
        let layout = RunLayout::of_shape(&[64, 64]);
        let options = PackOptions::default();
        let mut values = vec![0.25; 4096];
        assert!(PartQuantizer::new(&values, layout, 0.01, &options).is_some());
        assert!(PartQuantizer::new(&values, layout, 1e-7, &options).is_none());
        values[7] = f32::INFINITY;
        assert!(PartQuantizer::new(&values, layout, 0.01, &options).is_none());
    }

    #[test]
    fn raw_bits_let_a_fine_step_fit_its_table() {
        let layout = RunLayout::of_shape(&[64, 64]);
        let values: Vec<f32> = (0..4096).map(|index| index as f32 / 4096.0 - 0.5).collect();
        let quantizer = PartQuantizer::new(&values, layout, 0.001, &PackOptions::default()).expect("it fits");
        assert_eq!(quantizer.raw_bits, 4, "250 codes on each side are 16 times 16");
    }
}
