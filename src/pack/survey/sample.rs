//! The runs of a part that stand for all of it.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::super::counting::sum_of_squares;
use super::super::quantize::{PartQuantizer, largest_magnitude, values_of};
use super::super::quantized_symbols::QuantizedSymbols;
use super::super::symbols::RunLayout;
use crate::tensor::TensorInfo;

/// Some runs of a part.
#[derive(Clone)]
pub struct Sample {
    /// Their weights, run after run.
    pub values: Vec<f32>,
    /// The layout of the sample, with the part's run length.
    pub layout: RunLayout,
    /// How many runs of the part each run stands for.
    pub weights: Vec<u64>,
    /// Sum of squares of the whole part.
    pub energy: f64,
    /// Root mean square of the whole part.
    pub root_mean_square: f64,
    /// Largest magnitude in the whole part.
    pub largest: f32,
}

impl Sample {
    /// Takes about this share of a part's runs, some of every half octave of energy.
    pub fn take(tensor: &TensorInfo, bytes: &[u8], layout: RunLayout, share: f64) -> Self {
        let all = values_of(&tensor.dtype, bytes);
        let measured: Vec<(f64, f32)> = (0..layout.runs())
            .into_par_iter()
            .map(|run| {
                let values = &all[layout.run_range(run)];
                (sum_of_squares(values), largest_magnitude(values))
            })
            .collect();
        let energy: f64 = measured.iter().map(|(energy, _)| energy).sum();
        let mut strata: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
        // A last run that is shorter than the others stands for itself only where it is alone.
        let whole_runs = (layout.elements / layout.run_elements).max(1);
        for (run, &(energy, _)) in measured.iter().enumerate().take(whole_runs) {
            let mean_square = energy / layout.run_range(run).len() as f64;
            let stratum = if mean_square > 0.0 { (2.0 * mean_square.log2()).floor() as i32 } else { i32::MIN };
            strata.entry(stratum).or_default().push(run);
        }
        let mut runs: Vec<(usize, u64)> = strata
            .values()
            .flat_map(|runs| {
                let taken = ((runs.len() as f64 * share).ceil() as usize).clamp(1, runs.len());
                (0..taken).map(move |index| {
                    let (first, next) = (index * runs.len() / taken, (index + 1) * runs.len() / taken);
                    (runs[(first + next) / 2], (next - first) as u64)
                })
            })
            .collect();
        runs.sort_unstable(); // neighbours of the part are neighbours here
        let mut values = Vec::new();
        for &(run, _) in &runs {
            values.extend_from_slice(&all[layout.run_range(run)]);
        }
        Self {
            layout: layout.of_elements(values.len()),
            values,
            weights: runs.iter().map(|&(_, weight)| weight).collect(),
            energy,
            root_mean_square: (energy / layout.elements.max(1) as f64).sqrt(),
            largest: measured.iter().map(|&(_, largest)| largest).fold(0.0, f32::max),
        }
    }

    /// The sample as symbols, without prediction.
    pub fn with_symbols<R>(&self, quantizer: &PartQuantizer, take: impl FnOnce(&QuantizedSymbols<'_>) -> R) -> R {
        let choice = quantizer.choice;
        let columns = quantizer.column_multipliers();
        let symbols = QuantizedSymbols {
            values: &self.values,
            prediction: None,
            layout: self.layout,
            step_of_run: &|run| quantizer.step_of_run(run),
            raw_bits: choice.raw_bits,
            rounding: choice.rounding,
            columns: columns.as_deref(),
            feedback: None,
        };
        take(&symbols)
    }
}
