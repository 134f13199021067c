//! Steps by column, where calibration knows what columns are multiplied with (section 6.1): finer where inputs are strong.
//!
//! With the errors of a row moved as feedback moves them, column k adds to the output's error by its weight d_k times its
//! squared step. At a given rate the sum is least where all columns add alike, steps in proportion to d_k^-1/2; but the codes of
//! a row then differ in scale, and one table for all costs bits. Somewhere between lies the best, another for each tensor, and
//! what it gains is measured before it is taken.

use super::calibration::feedback::ColumnFeedback;
use super::counting::measure;
use super::entropy_model::TablePool;
use super::quantized_symbols::QuantizedSymbols;
use crate::codec::integers;
use crate::codec::quantizer::scale_multiplier;

/// Exponents tried, in halves of that of the weights.
const STRENGTHS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];

/// Scales of columns, and what they need.
pub struct ColumnSteps {
    /// Scale integers, by column.
    pub scales: Vec<i32>,
    /// What the part's step is multiplied by to keep its rate.
    pub step_factor: f32,
}

/// The scales that lessen the output's error the most at the rate of `symbols`, which have none; `None` where none do.
pub fn choose_columns(
    symbols: &QuantizedSymbols<'_>,
    feedback: &ColumnFeedback,
    pool: &TablePool,
    measured_elements: usize,
) -> Option<ColumnSteps> {
    let elements = symbols.layout.elements as f64;
    let every = symbols.layout.elements / measured_elements.min(symbols.layout.elements).max(1);
    let without = measure(symbols, pool, every)?;
    let mut best: Option<(f64, ColumnSteps)> = None;
    for strength in STRENGTHS {
        let scales = feedback.column_scales(strength);
        let multipliers: Vec<f32> = scales.iter().map(|&scale| scale_multiplier(scale)).collect();
        let with = measure(&QuantizedSymbols { columns: Some(&multipliers), ..*symbols }, pool, every)?;
        // A step that is larger by an octave saves a bit, and makes the error larger by two.
        let more_bits = (with + 8.0 * integers::encode(&scales).0.len() as f64 - without) / elements;
        let change = more_bits + 0.5 * feedback.mean_weight(&multipliers).log2();
        if change < best.as_ref().map_or(0.0, |(least, _)| *least) {
            best = Some((change, ColumnSteps { scales, step_factor: more_bits.exp2() as f32 }));
        }
    }
    best.map(|(change, steps)| {
        log::debug!("steps by column: {:.3} bits per weight better at equal error", -change);
        steps
    })
}
