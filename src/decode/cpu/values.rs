//! What the positions of a run's tables turn into: the step, the rounding and the exponent's place are looked up, not
//! computed per symbol.

use super::kernels::{RunValues, TableUse};
use crate::codec::entropy::CodingTable;
use crate::codec::quantizer::dequantize;
use crate::numerics::{bf16_from_f32, f16_from_f32};
use crate::tensor::Dtype;

/// What a kernel writes for a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The code, 16 bits.
    Code,
    /// The position itself.
    Position,
    /// The code in the magnitude bits above `low_bits`.
    Magnitude {
        /// Bits of an element, 16 or 32.
        width: u32,
        /// Bits below the symbol.
        low_bits: u32,
    },
    /// The dequantized value, rounded to bfloat16.
    Bf16,
    /// The dequantized value, rounded to binary16.
    F16,
    /// The dequantized value.
    F32,
}

impl Meaning {
    /// A weight of this type.
    pub fn weight(dtype: &Dtype) -> Self {
        match dtype {
            Dtype::BF16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            _ => Self::F32,
        }
    }

    /// Fills `values` for a run of these tables, step and mean.
    pub fn fill(
        self,
        values: &mut RunValues,
        tables: [&CodingTable; 2],
        table_use: TableUse,
        step: f32,
        mean: Option<f32>,
    ) {
        let quantizers = if table_use == TableUse::One { 1 } else { 2 };
        for (quantizer, table) in tables.into_iter().enumerate().take(quantizers) {
            let table = table.decoding();
            let points = match table_use {
                TableUse::One => &table.points,
                _ => &table.trellis_points[quantizer],
            };
            let (low, high) = (&mut values.low[quantizer], &mut values.high[quantizer]);
            match self {
                Self::Code => *low = table.codes.map(|code| code as u16),
                Self::Position => *low = std::array::from_fn(|position| position as u16),
                Self::Magnitude { width, low_bits } => {
                    let bits = table.codes.map(|code| u32::from(code as u16) << low_bits & u32::MAX >> (33 - width));
                    *low = bits.map(|bits| bits as u16);
                    *high = bits.map(|bits| (bits >> 16) as u16);
                }
                Self::Bf16 => *low = points.map(|point| bf16_from_f32(dequantize(point, step, mean))),
                Self::F16 => *low = points.map(|point| f16_from_f32(dequantize(point, step, mean))),
                Self::F32 => {
                    let bits = points.map(|point| dequantize(point, step, mean).to_bits());
                    *low = bits.map(|bits| bits as u16);
                    *high = bits.map(|bits| (bits >> 16) as u16);
                }
            }
        }
    }
}
