//! Which bit-exact coding suits a tensor, by measured entropy: the type that carries its elements and where they are split, or
//! integers in its bytes.

use super::counting::mean_raw_bits;
use super::histogram::Histogram;
use super::split_symbols::{ExactSymbols, SplitSymbols};
use super::symbols::{RunLayout, Symbols};
use super::unit_symbols::{UnitSplit, UnitSymbols};
use crate::codec::lossless::narrow;
use crate::format::part::Carrier;
use crate::tensor::{Dtype, TensorInfo};

/// Runs looked at to choose a split.
const SAMPLED_RUNS: usize = 64;
/// A split that moves mantissa bits into the symbol must save this many bits per element: whole bytes decode faster.
const SPLIT_GAIN: f64 = 0.015;
/// Elements below which a tensor stays raw: its share of a table and its header take some 25 bytes.
const LEAST_ELEMENTS: u64 = 64;

/// Bits of a part's header, place in the index and share of a table, about.
const PART_BITS: f64 = 8.0 * 48.0;
/// Share of the raw bits that entropy coding must save: raw bytes decode at the speed of a copy.
const LEAST_SAVING: f64 = 0.005;

/// A chosen bit-exact coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Elements, as exponents and the bits below.
    Elements(ElementSplit),
    /// Integers in the tensor's bytes.
    Units(UnitSplit),
}

impl Split {
    /// The coding that takes a tensor shortest, or `None` where raw bytes are no longer.
    pub fn choose(tensor: &TensorInfo, bytes: &[u8]) -> Option<Self> {
        let raw_bits = 8.0 * bytes.len() as f64;
        let units = unit_splits(tensor, bytes).into_iter().map(|split| {
            let split = Self::Units(split);
            (split, split.estimated_bits(tensor, bytes) + PART_BITS)
        });
        let units =
            units.filter(|&(_, bits)| bits < (1.0 - LEAST_SAVING) * raw_bits).min_by(|(_, a), (_, b)| a.total_cmp(b));
        match (ElementSplit::choose(tensor, bytes), units) {
            (Some((_, bits)), Some((units, fewer))) if fewer < bits => Some(units),
            (Some((split, _)), _) => Some(Self::Elements(split)),
            (None, units) => units.map(|(units, _)| units),
        }
    }

    /// The tensor's symbols under this split.
    pub fn symbols<'a>(&self, tensor: &TensorInfo, bytes: &'a [u8]) -> Box<dyn ExactSymbols + 'a> {
        match self {
            Self::Elements(split) => Box::new(split.symbols(tensor, bytes)),
            Self::Units(split) => Box::new(UnitSymbols::new(tensor, bytes, *split)),
        }
    }

    /// Bits of all symbols and raw bits, about, by a look at some runs.
    pub fn estimated_bits(&self, tensor: &TensorInfo, bytes: &[u8]) -> f64 {
        let symbols = self.symbols(tensor, bytes);
        sampled_bits(&*symbols) * symbols.layout().elements as f64
    }

    /// The name in plans and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Elements(_) => "split",
            Self::Units(_) => "units",
        }
    }
}

/// The ways in which the bytes of a tensor may be integers.
fn unit_splits(tensor: &TensorInfo, bytes: &[u8]) -> Vec<UnitSplit> {
    use Dtype as D;
    let element_bits = tensor.dtype.bits().filter(|bits| matches!(bits, 8 | 16 | 32 | 64)).unwrap_or(8) as u32;
    let layout = UnitSplit::layout(tensor, element_bits);
    let mut splits = Vec::new();
    splits.extend(UnitSplit::listed(bytes, element_bits, false, layout));
    if matches!(tensor.dtype, D::F64 | D::F32 | D::F16 | D::BF16 | D::F8_E4M3 | D::F8_E5M2 | D::C64) {
        return splits;
    }
    if element_bits > 8 && splits.is_empty() {
        splits.extend(UnitSplit::listed(bytes, element_bits, true, layout));
    }
    let is_signed = matches!(tensor.dtype, D::I8 | D::I16 | D::I32 | D::I64);
    splits.push(UnitSplit::numbers(bytes, element_bits, is_signed));
    if element_bits > 8 {
        splits.push(UnitSplit::numbers(bytes, 8, false));
    }
    // Two in a byte or eight in an integer, as quantized checkpoints have them.
    if matches!(tensor.dtype, D::F4 | D::U8 | D::I8 | D::I32 | D::U32) {
        splits.push(UnitSplit::numbers(bytes, 4, false));
    }
    splits
}

/// A split of a float tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementSplit {
    carrier: Carrier,
    carrier_bits: u32,
    mantissa_bits: u32,
    raw_bits: u32,
}

impl ElementSplit {
    /// The split that codes the tensor shortest and its bits, or `None` where raw bytes are no longer.
    fn choose(tensor: &TensorInfo, bytes: &[u8]) -> Option<(Self, f64)> {
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
        let cost = |split: Self| sampled_bits(&split.symbols(tensor, bytes));
        let mut best = (split(0), cost(split(0)));
        for mantissa_in_symbol in 1..=mantissa_bits.min(2) {
            let candidate = split(mantissa_in_symbol);
            let cost = cost(candidate);
            if cost < best.1 - SPLIT_GAIN {
                best = (candidate, cost);
            }
        }
        let worth = best.1 < f64::from(carrier_bits) - 0.05 || carrier != Carrier::Own;
        worth.then_some((best.0, best.1 * tensor.elements() as f64 + PART_BITS))
    }

    /// The tensor's elements under this split.
    fn symbols<'a>(&self, tensor: &TensorInfo, bytes: &'a [u8]) -> SplitSymbols<'a> {
        let element_bytes = tensor.dtype.bits().unwrap_or(8) as usize / 8;
        let layout = RunLayout::of_shape(&tensor.shape, None);
        let carrier = (self.carrier, self.carrier_bits);
        SplitSymbols::new(bytes, element_bytes, layout, carrier, self.mantissa_bits, self.raw_bits)
    }
}

fn holds_every_element(carrier: Carrier, bytes: &[u8]) -> bool {
    bytes.as_chunks().0.iter().all(|&element| narrow(carrier, u32::from_le_bytes(element).into()).is_some())
}

/// Bits of a symbol and what is raw below it, of some runs and with one distribution for all: good enough to compare splits.
fn sampled_bits(symbols: &dyn Symbols) -> f64 {
    let runs = symbols.layout().runs();
    let mut sampled = Vec::new();
    for run in (0..runs).step_by(runs.div_ceil(SAMPLED_RUNS).max(1)) {
        symbols.nearest(run, &mut sampled);
    }
    Histogram::of(&sampled).entropy_bits() / sampled.len().max(1) as f64 + mean_raw_bits(symbols)
}
