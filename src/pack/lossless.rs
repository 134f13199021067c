//! Which bit-exact coding suits a tensor: the type that carries it and where its elements are split, by measured entropy.

use super::counting::mean_raw_bits;
use super::histogram::Histogram;
use super::split_symbols::SplitSymbols;
use super::symbols::{RunLayout, Symbols};
use crate::codec::lossless::narrow;
use crate::format::part::Carrier;
use crate::tensor::{Dtype, TensorInfo};

/// Runs looked at to choose a split.
const SAMPLED_RUNS: usize = 64;
/// A split that moves mantissa bits into the symbol must save this many bits per element: whole bytes decode faster.
const SPLIT_GAIN: f64 = 0.015;
/// Elements below which a tensor stays raw: its share of a table and its header take some 30 bytes.
const LEAST_ELEMENTS: u64 = 192;

/// A chosen split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// The type that is split.
    pub carrier: Carrier,
    carrier_bits: u32,
    mantissa_bits: u32,
    raw_bits: u32,
}

impl Split {
    /// The split that codes the tensor shortest, or `None` where raw bytes are no longer.
    pub fn choose(tensor: &TensorInfo, bytes: &[u8]) -> Option<Self> {
        if tensor.elements() < LEAST_ELEMENTS {
            return None;
        }
        let (carrier, carrier_bits, mantissa_bits) = match tensor.dtype {
            Dtype::F32 => [(Carrier::Bf16, 7), (Carrier::F16, 10)]
                .into_iter()
                .find(|&(carrier, _)| holds_every_element(carrier, bytes))
                .map_or((Carrier::Own, 32, 23), |(carrier, mantissa)| (carrier, 16, mantissa)),
            Dtype::BF16 => (Carrier::Own, 16, 7),
            Dtype::F16 => (Carrier::Own, 16, 10),
            Dtype::F64 => (Carrier::Own, 64, 52),
            Dtype::F8_E4M3 => (Carrier::Own, 8, 3),
            Dtype::F8_E5M2 => (Carrier::Own, 8, 2),
            _ => return None,
        };
        let split = |mantissa_in_symbol: u32| Self {
            carrier,
            carrier_bits,
            mantissa_bits,
            raw_bits: mantissa_bits + 1 - mantissa_in_symbol,
        };
        let cost = |split: Self| {
            let symbols = split.symbols(tensor, bytes);
            let every = symbols.layout.runs().div_ceil(SAMPLED_RUNS);
            split_entropy(&symbols, every) + mean_raw_bits(&symbols)
        };
        let mut best = (split(0), cost(split(0)));
        for mantissa_in_symbol in 1..=mantissa_bits.min(2) {
            let candidate = split(mantissa_in_symbol);
            let cost = cost(candidate);
            if cost < best.1 - SPLIT_GAIN {
                best = (candidate, cost);
            }
        }
        let worth = best.1 < f64::from(carrier_bits) - 0.05 || carrier != Carrier::Own;
        worth.then_some(best.0)
    }

    /// Bits of all symbols and raw bits, about, by a look at some runs.
    pub fn estimated_bits(&self, tensor: &TensorInfo, bytes: &[u8]) -> f64 {
        let symbols = self.symbols(tensor, bytes);
        let every = symbols.layout.runs().div_ceil(SAMPLED_RUNS);
        (split_entropy(&symbols, every) + mean_raw_bits(&symbols)) * tensor.elements() as f64
    }

    /// The tensor's elements under this split.
    pub fn symbols<'a>(&self, tensor: &TensorInfo, bytes: &'a [u8]) -> SplitSymbols<'a> {
        let element_bytes = tensor.dtype.bits().unwrap_or(8) as usize / 8;
        let layout = RunLayout::of_shape(&tensor.shape, None);
        let carrier = (self.carrier, self.carrier_bits);
        SplitSymbols::new(bytes, element_bytes, layout, carrier, self.mantissa_bits, self.raw_bits)
    }
}

fn holds_every_element(carrier: Carrier, bytes: &[u8]) -> bool {
    bytes.as_chunks().0.iter().all(|&element| narrow(carrier, u32::from_le_bytes(element).into()).is_some())
}

/// Entropy of the sampled symbols in bits each, one distribution for all: good enough to compare splits.
fn split_entropy(symbols: &SplitSymbols<'_>, every: usize) -> f64 {
    let mut sampled = Vec::new();
    for run in (0..symbols.layout.runs()).step_by(every.max(1)) {
        symbols.nearest(run, &mut sampled);
    }
    let total = sampled.len().max(1) as f64;
    let counted = Histogram::of(&sampled);
    counted.occurring().map(|(_, count)| -(count as f64 / total) * (count as f64 / total).log2()).sum()
}
