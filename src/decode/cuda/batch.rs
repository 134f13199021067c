//! What launches decode, laid out as the kernel reads it: descriptions of parts and strips, and the strips' stored bytes.
//!
//! Everything lies in one piece of memory, so that one copy takes it to the device. Of arrays with an item per run or row only
//! those of the strips at hand are sent; their addresses are those of item 0, wherever that would be, and the kernel counts as
//! the part does.

use std::ops::Range;

use super::description::{
    BF16, BITS, CODED, COLUMN_SCALES, DIFFERENCES, END_STATE, EXCEPTION_POSITION, F16, F32, FROM_BF16, FROM_F16,
    LOW_RANK, MEANS, NONE, OFFSETS, PAIRS, Part, Plain, Run, Status, Strip, TABLE_BYTES, TRELLIS, VALUES, VECTORS,
    WORDS, bytes_of, table_words,
};
use super::device::{Kernel, Launch};
use crate::codec::entropy::LaneError;
use crate::codec::predictor::RunPredictor;
use crate::codec::vector_quantizer::VectorQuantizer;
use crate::decode::prepared::{Based, PartKind, Prediction, Quantizer, Symbols};
use crate::decode::{DecodeError, PreparedPart};
use crate::format::part::{Carrier, TrellisTables};
use crate::tensor::Dtype;

/// What is placed begins on a multiple of this: more than any type of the kernel needs.
const ALIGNMENT: usize = 16;

/// Whether the kernels decode parts of this kind to more than a copy of what is stored. Kinds they do not know are the CPU
/// engine's.
pub fn supports(part: &PreparedPart) -> bool {
    match part.kind() {
        PartKind::Raw => false,
        PartKind::Quantized { prediction, .. } => prediction.as_ref().is_none_or(|found| found.composite().is_none()),
        PartKind::Split { .. } | PartKind::Units { .. } | PartKind::Based(_) => true,
    }
}

/// Strips being laid out in memory that is going to be copied to the device. Each has a key of its caller's, of type `K`.
#[derive(Debug)]
pub struct Batch<'s, K> {
    staging: &'s mut [u8],
    used: usize,
    /// Where the first byte of `staging` will lie on the device.
    address: u64,
    /// Where on the device what only it reads and writes begins: statuses and rooms for coded orders.
    rooms: u64,
    rooms_used: usize,
    /// By kernel.
    strips: [Vec<(Strip, K)>; Kernel::ALL.len()],
}

/// A part whose description has been laid out.
#[derive(Clone, Copy, Debug)]
pub struct PlacedPart {
    address: u64,
    kernel: Kernel,
}

/// A batch ready to be copied and launched.
#[derive(Debug)]
pub struct Launches<K> {
    /// Bytes to copy, from the first of the batch's memory on.
    pub bytes: usize,
    /// What to launch then.
    pub launches: Vec<Launch>,
    /// Where the statuses will be, one for each of `keys`, [`STATUS_BYTES`] each.
    pub statuses: u64,
    /// Of all strips, in the order of their statuses.
    pub keys: Vec<K>,
}

/// Bytes of a strip's status.
pub const STATUS_BYTES: usize = size_of::<Status>();

/// Factors as the kernel reads them.
fn widened(factors: &[i16]) -> Vec<i32> {
    factors.iter().map(|&factor| factor.into()).collect()
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Bytes that a part's description takes in a batch, for these of its strips.
pub fn part_bytes(part: &PreparedPart, strips: Range<usize>) -> usize {
    let mut lengths = vec![size_of::<Part>()];
    if let Some(symbols) = part.symbols() {
        lengths.push(symbols.tables().len() * TABLE_BYTES);
        lengths.push(runs_of(part, symbols, strips.clone()).len() * size_of::<Run>());
    }
    match part.kind() {
        PartKind::Raw | PartKind::Split { .. } => {}
        PartKind::Units { units, .. } => lengths.push(size_of_val(units.values())),
        PartKind::Quantized { quantizer, prediction, .. } => {
            lengths.extend(quantizer.column_scales().map(size_of_val));
            let codebooks = quantizer.vectors.iter().flat_map(VectorQuantizer::stages);
            lengths.extend(codebooks.map(|codebook| size_of_val(codebook.values())));
            let motion = prediction.as_ref().and_then(|prediction| prediction.motion.as_ref());
            lengths.extend(motion.map(|motion| size_of_val(motion.map().1)));
        }
        PartKind::Based(based) => {
            let elements = elements_of(part, strips);
            if let Some(low_rank) = &based.low_rank {
                let rows = elements.start / low_rank.columns..elements.end.div_ceil(low_rank.columns);
                lengths.push(rows.len() * low_rank.rank * size_of::<i32>());
                lengths.push(low_rank.right.len() * size_of::<i32>());
            }
            if let Some(difference) = &based.difference {
                let row = difference.classes.row_elements;
                lengths.push((elements.start / row..elements.end.div_ceil(row)).len() * size_of::<i32>());
            }
        }
    }
    lengths.into_iter().map(aligned).sum()
}

/// Bytes that a strip takes in a batch.
pub fn strip_bytes(part: &PreparedPart, strip: usize) -> usize {
    let range = part.strip_range(strip);
    aligned((range.end - range.start) as usize) + aligned(size_of::<Strip>())
}

/// Bytes that a strip takes on the device beside the batch and its output.
pub fn room_bytes(part: &PreparedPart, strip: usize) -> usize {
    let order = if needs_order(part) { aligned(symbols_of(part, strip) * size_of::<u16>()) } else { 0 };
    STATUS_BYTES + order
}

/// The elements that strips decode, counted in the part; bytes where it is raw.
fn elements_of(part: &PreparedPart, strips: Range<usize>) -> Range<usize> {
    let bytes = part.output_range(strips);
    let bits = if matches!(part.kind(), PartKind::Raw) { 8 } else { part.symbol_bits() };
    let element = |byte: u64| 8 * byte as usize / bits;
    element(bytes.start)..element(bytes.end)
}

/// Symbols of a strip, of what stands for them where none are coded.
fn symbols_of(part: &PreparedPart, strip: usize) -> usize {
    elements_of(part, strip..strip + 1).len()
}

fn needs_order(part: &PreparedPart) -> bool {
    part.based().is_some_and(|based| based.difference.is_some())
}

/// The runs to describe: those of the strips, or the first of them where all are alike.
fn runs_of(part: &PreparedPart, symbols: &Symbols, strips: Range<usize>) -> Range<usize> {
    let of_part = elements_of(part, 0..part.strips()).end.div_ceil(symbols.run_elements);
    let runs = strips.start * symbols.runs_per_strip..(strips.end * symbols.runs_per_strip).min(of_part);
    if has_one_run(part, symbols) { runs.start..runs.start + 1 } else { runs }
}

/// Whether all runs of a part are described alike.
fn has_one_run(part: &PreparedPart, symbols: &Symbols) -> bool {
    symbols.runs_are_alike()
        && match part.kind() {
            PartKind::Quantized { quantizer, prediction, .. } => {
                quantizer.is_uniform() && prediction.as_ref().is_none_or(Prediction::is_uniform)
            }
            _ => true,
        }
}

/// What a run has of its own.
fn describe_run(part: &PreparedPart, symbols: &Symbols, number: usize) -> Run {
    let (stored, zeros) = symbols.stored_raw_bits(number);
    let mut run =
        Run { table: symbols.table_number_of_run(number) as u32, raw_bits: stored | zeros << 8, ..Run::default() };
    if let PartKind::Quantized { quantizer, prediction, .. } = part.kind() {
        run.step = quantizer.step_of_run(number);
        run.mean = quantizer.mean_of_run(number).unwrap_or(0.0);
        match prediction.as_ref().map(|prediction| prediction.of_run(number)) {
            Some(RunPredictor::ScaledCopy { gain }) => run.gain = gain,
            Some(RunPredictor::RowAffine { gain, offset }) => (run.gain, run.offset) = (gain, offset),
            None => {}
        }
    }
    run
}

impl<'s, K> Batch<'s, K> {
    /// An empty batch in `staging`, which will be copied to `address`; `rooms` is where the device has memory beside it.
    pub fn new(staging: &'s mut [u8], address: u64, rooms: u64) -> Self {
        Self { staging, used: 0, address, rooms, rooms_used: 0, strips: Default::default() }
    }

    /// Places bytes; where they will lie on the device.
    fn place(&mut self, bytes: &[u8]) -> u64 {
        let start = self.used;
        self.staging[start..start + bytes.len()].copy_from_slice(bytes);
        self.used = aligned(start + bytes.len());
        self.address + start as u64
    }

    /// Places items of an array from number `first` on; where its item 0 would lie.
    fn place_from<T: Plain>(&mut self, items: &[T], first: usize) -> u64 {
        self.place(bytes_of(items)).wrapping_sub((first * size_of::<T>()) as u64)
    }

    /// Memory beside the batch.
    fn room(&mut self, bytes: usize) -> u64 {
        let start = self.rooms_used;
        self.rooms_used = aligned(start + bytes);
        self.rooms + start as u64
    }

    /// Places the description of a part, for these of its strips: [`part_bytes`].
    pub fn add_part(&mut self, part: &PreparedPart, strips: Range<usize>) -> PlacedPart {
        let mut description = Part {
            symbol_bits: part.symbol_bits() as u32,
            element: match part.dtype() {
                Dtype::F32 => F32,
                Dtype::F16 => F16,
                Dtype::BF16 => BF16,
                _ => BITS,
            },
            exception_bytes: part.layout(strips.start).map_or(0, |layout| layout.exception_value_bytes as u32),
            ..Part::default()
        };
        if let Some(symbols) = part.symbols() {
            self.describe_symbols(part, symbols, strips.clone(), &mut description);
        }
        let kernel = match part.kind() {
            PartKind::Raw => Kernel::Raw,
            PartKind::Split { carrier, carrier_bits, .. } => {
                description.carrier_bits = *carrier_bits;
                description.flags |= match carrier {
                    Carrier::Own => 0,
                    Carrier::F16 => FROM_F16,
                    Carrier::Bf16 => FROM_BF16,
                };
                Kernel::Split
            }
            PartKind::Units { units, .. } => {
                description.values = self.place(bytes_of(units.values()));
                description.values_listed = units.values().len() as u32;
                description.flags |= if units.has_values() { VALUES } else { 0 };
                description.flags |= if units.has_differences() { DIFFERENCES } else { 0 };
                Kernel::Units
            }
            PartKind::Quantized { quantizer, prediction, .. } => {
                self.describe_quantizer(quantizer, &mut description);
                if let Some(prediction) = prediction {
                    self.describe_prediction(prediction, &mut description);
                }
                if prediction.is_some() { Kernel::Predicted } else { Kernel::Quantized }
            }
            PartKind::Based(based) => {
                self.describe_based(based, elements_of(part, strips), &mut description);
                Kernel::Based
            }
        };
        PlacedPart { address: self.place(bytes_of(&[description])), kernel }
    }

    fn describe_symbols(
        &mut self,
        part: &PreparedPart,
        symbols: &Symbols,
        strips: Range<usize>,
        description: &mut Part,
    ) {
        description.run_elements = symbols.run_elements as u32;
        description.lanes = symbols.lanes as u32;
        description.raw_bits = symbols.raw_bits;
        let tables: Vec<u32> = symbols.tables().iter().flat_map(|table| table_words(table)).collect();
        description.tables = self.place(bytes_of(&tables));
        let numbers = runs_of(part, symbols, strips);
        let first = if has_one_run(part, symbols) { 0 } else { numbers.start };
        let runs: Vec<Run> = numbers.map(|number| describe_run(part, symbols, number)).collect();
        description.runs = self.place_from(&runs, first);
        description.run_stride = u32::from(!has_one_run(part, symbols));
    }

    fn describe_quantizer(&mut self, quantizer: &Quantizer, description: &mut Part) {
        if quantizer.mean_of_run(0).is_some() {
            description.flags |= MEANS;
        }
        if let Some((tables, trellis)) = quantizer.trellis {
            description.flags |= TRELLIS;
            description.flags |= if tables == TrellisTables::Pairs { PAIRS } else { 0 };
            (description.from_second, description.from_odd) = (trellis.from_second.into(), trellis.from_odd.into());
        }
        if let Some(scales) = quantizer.column_scales() {
            description.flags |= COLUMN_SCALES;
            description.column_scales = self.place(bytes_of(scales));
        }
        if let Some(vectors) = &quantizer.vectors {
            let [first, second] = vectors.stages();
            description.flags |= VECTORS;
            description.vector_elements = vectors.elements() as u32;
            (description.first_index_bits, description.second_index_bits) = (first.index_bits(), second.index_bits());
            description.values = self.place(bytes_of(first.values()));
            description.second_values = self.place(bytes_of(second.values()));
        }
    }

    fn describe_prediction(&mut self, prediction: &Prediction, description: &mut Part) {
        description.flags |= if prediction.is_uniform() { 0 } else { OFFSETS };
        if let Some(motion) = &prediction.motion {
            let (stride, sources) = motion.map();
            description.motion = self.place(bytes_of(sources));
            description.motion_stride = stride as u64;
            description.motion_length = sources.len() as u32;
        }
    }

    fn describe_based(&mut self, based: &Based, elements: Range<usize>, description: &mut Part) {
        if let Some(low_rank) = &based.low_rank {
            let (rank, columns) = (low_rank.rank, low_rank.columns);
            let first = elements.start / columns * rank;
            description.flags |= LOW_RANK;
            let left = widened(&low_rank.left[first..elements.end.div_ceil(columns) * rank]);
            description.left = self.place_from(&left, first);
            description.right = self.place(bytes_of(&widened(&low_rank.right)));
            description.columns = columns as u64;
            description.rank = rank as u32;
            description.low_rank_scale = low_rank.scale;
        }
        if let Some(difference) = &based.difference {
            let classes = &difference.classes;
            let rows = elements.start / classes.row_elements..elements.end.div_ceil(classes.row_elements);
            let offsets: Vec<i32> = rows.clone().map(|row| classes.offsets.get(row)).collect();
            description.flags |= CODED;
            description.class_offsets = self.place_from(&offsets, rows.start);
            description.class_row_elements = classes.row_elements as u64;
            description.class_shift = classes.shift;
            description.zero_bits = difference.zero_bits;
        }
    }

    /// Places a strip of a part that has been placed for it. `stored` is what [`PreparedPart::strip_range`] covers, its
    /// checksum found right; `out` is where on the device its elements go, on a multiple of 16; `reference` is where element 0
    /// of what the part is predicted from would lie there.
    pub fn add_strip(
        &mut self,
        placed: PlacedPart,
        (part, strip): (&PreparedPart, usize),
        stored: &[u8],
        out: u64,
        reference: u64,
        key: K,
    ) {
        let symbols = symbols_of(part, strip);
        let order = if needs_order(part) { self.room(symbols * size_of::<u16>()) } else { 0 };
        let layout = part.layout(strip);
        let strip = Strip {
            part: placed.address,
            stored: self.place(stored),
            out,
            reference,
            order,
            first_element: elements_of(part, strip..strip + 1).start as u64,
            first_run: part.symbols().map_or(0, |symbols| (strip * symbols.runs_per_strip) as u64),
            symbols: symbols as u32,
            words: layout.map_or(0, |layout| layout.words as u32),
            raw_bytes: layout.map_or(0, |layout| layout.raw_bytes as u32),
            exceptions: layout.map_or(0, |layout| layout.exceptions as u32),
        };
        self.strips[placed.kernel as usize].push((strip, key));
    }

    /// Places the descriptions of all strips.
    pub fn finish(mut self) -> Launches<K> {
        let by_kernel = std::mem::take(&mut self.strips);
        let count: usize = by_kernel.iter().map(Vec::len).sum();
        let statuses = self.room(count * STATUS_BYTES);
        let (mut launches, mut keys) = (Vec::new(), Vec::with_capacity(count));
        for (kernel, strips) in Kernel::ALL.into_iter().zip(by_kernel) {
            if strips.is_empty() {
                continue;
            }
            let own_statuses = statuses + (keys.len() * STATUS_BYTES) as u64;
            let (strips, own_keys): (Vec<Strip>, Vec<K>) = strips.into_iter().unzip();
            keys.extend(own_keys);
            let (address, count) = (self.place(bytes_of(&strips)), strips.len() as u32);
            launches.push(Launch { kernel, strips: address, count, statuses: own_statuses });
        }
        Launches { bytes: self.used, launches, statuses, keys }
    }
}

/// What a strip's status says is wrong, as the reference decoder would say it; as an error the status itself, where it is
/// none that the kernel writes.
pub fn failure(
    part: &PreparedPart,
    strip: usize,
    status: &[u8; STATUS_BYTES],
) -> Result<Option<DecodeError>, UnknownStatus> {
    let Status { failure, found, state, .. } = Status::read(status);
    let words = part.layout(strip).map_or(0, |layout| layout.words);
    let error = match failure {
        NONE => return Ok(None),
        WORDS if found as usize > words => LaneError::WordsMissing { words },
        WORDS => LaneError::WordsLeft { used: found as usize, words },
        END_STATE => LaneError::EndState { lane: found as usize, state },
        EXCEPTION_POSITION => {
            let symbols = symbols_of(part, strip);
            return Ok(Some(DecodeError::ExceptionPosition { strip, position: found as u16, symbols }));
        }
        other => return Err(UnknownStatus(other)),
    };
    Ok(Some(DecodeError::Lanes { strip, error }))
}

/// A device that is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a strip has status {0}, which there is not")]
pub struct UnknownStatus(u32);
