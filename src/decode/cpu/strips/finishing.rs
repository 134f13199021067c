//! What runs still need when their symbols are decoded: raw bits, predictions, rounding, and at the end exceptions.

use std::cell::RefCell;
use std::ops::Range;

use super::{PartDecoder, Path, Strip};
use crate::codec::lossless::widen;
use crate::codec::motion::Motion;
use crate::codec::predictor::references::References;
use crate::codec::quantizer::{dequantize, join_code};
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::decode::DecodeError;
use crate::decode::cpu::differences;
use crate::decode::cpu::finish::{RunPrediction, join_any};
use crate::decode::cpu::raw_bits::RawBits;
use crate::decode::cpu::stages::Stage;
use crate::decode::cpu::units::{join_units, replace_unit};
use crate::decode::cpu::values::Meaning;
use crate::decode::prepared::{Based, Difference, PartKind, Prediction, Quantizer};
use crate::format::part::{Carrier, TrellisTables};
use crate::format::strip::raw_bytes_of_run;
use crate::tensor::Dtype;

thread_local! {
    /// A strip's differences in coded order, and its classes: memory that is new for every strip would cost more time than
    /// what is done with it.
    static SCRATCH: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

impl<'a> PartDecoder<'a> {
    /// What is left to do with the runs that fill `elements`, whose values are there.
    pub(super) fn finish(&self, strip: &mut Strip<'_>, elements: Range<usize>) {
        let is_final = match self.path {
            Path::Final | Path::Joined { .. } => true,
            // Sixteen-bit symbols are differences already where nothing lies below them.
            Path::Difference { zero_bits } => self.element_bytes == 2 && zero_bits == 0 && self.symbols.raw_bits == 0,
            _ => false,
        };
        if is_final {
            return;
        }
        let mut values = std::mem::take(&mut strip.scratch);
        let value_bytes = values.len() / elements.len(); // 0 where values are not in scratch memory
        for start in elements.clone().step_by(self.symbols.run_elements) {
            let end = elements.end.min(start + self.symbols.run_elements);
            let of_run = value_bytes * (start - elements.start)..value_bytes * (end - elements.start);
            self.finish_run(strip, start..end, &mut values[of_run]);
        }
        strip.scratch = values;
        self.ended(Stage::RawBits);
    }

    fn finish_run(&self, strip: &mut Strip<'_>, elements: Range<usize>, values: &mut [u8]) {
        let finish = &self.kernels.finish;
        let run_of_part = self.run_of_part(strip, elements.start / self.symbols.run_elements);
        let bytes = match self.path {
            Path::Units { units } => units.bytes_of(elements.start)..units.bytes_of(elements.end),
            _ => elements.start * self.element_bytes..elements.end * self.element_bytes,
        };
        let mut bit_planes = std::mem::take(&mut strip.bit_planes);
        let stored_bits = self.symbols.stored_raw_bits(run_of_part);
        let (raw, later) = strip.raw.split_at(raw_bytes_of_run(elements.len(), stored_bits.0 as usize));
        strip.raw = later;
        let raw = RawBits::of_run(raw, elements.len(), stored_bits, finish.spread, &mut bit_planes);
        // SAFETY of every call below: whoever chose the kernels made sure that the CPU has their instructions.
        match self.path {
            Path::Final | Path::Joined { .. } => {}
            Path::Difference { zero_bits } => match self.element_bytes {
                2 if raw.planes().is_empty() => {
                    differences::shift_in_place(strip.out[bytes].as_chunks_mut().0, zero_bits);
                }
                2 => {
                    let out = &mut strip.out[bytes];
                    let symbols = out.as_chunks().0.to_vec();
                    differences::join::<u16>(&symbols, &raw, zero_bits, out);
                }
                1 => differences::join::<u8>(values.as_chunks().0, &raw, zero_bits, &mut strip.out[bytes]),
                _ => differences::join::<u32>(values.as_chunks().0, &raw, zero_bits, &mut strip.out[bytes]),
            },
            Path::Split16 { carrier: Carrier::Own } => {
                // SAFETY: see above.
                unsafe { (finish.join_16)(&raw, strip.out[bytes].as_chunks_mut().0) }
            }
            Path::Split16 { carrier } => {
                let elements = values.as_chunks_mut().0;
                let widen = if carrier == Carrier::Bf16 { finish.widen_bf16 } else { finish.widen_f16 };
                // SAFETY: see above.
                unsafe {
                    (finish.join_16)(&raw, elements);
                    widen(elements, strip.out[bytes].as_chunks_mut().0);
                }
            }
            // SAFETY: see above.
            Path::Split32 => unsafe {
                (finish.join_32)(values.as_chunks().0, &raw, strip.out[bytes].as_chunks_mut().0);
            },
            Path::SplitAny { width } => {
                join_any(values.as_chunks().0, &raw, width, &mut strip.out[bytes]);
            }
            Path::Units { units } => join_units(values.as_chunks().0, &raw, units, &mut strip.out[bytes]),
            Path::Residual { prediction } => {
                self.scale_columns(values.as_chunks_mut().0);
                let first = self.first_element(strip) + elements.start;
                let elements = first..first + elements.len();
                let prediction = prediction.map_or(RunPrediction::None, |prediction| {
                    self.prediction_of_run(prediction, run_of_part, elements, &mut strip.gathered)
                });
                self.round(values, prediction, &mut strip.out[bytes]);
            }
            Path::Raw { trellis, prediction } => {
                let (step, mean) = self.step_and_mean(run_of_part);
                let mut residuals = std::mem::take(&mut strip.residuals);
                residuals.resize(elements.len(), [0; 4]);
                match trellis {
                    // SAFETY: see above.
                    None => unsafe {
                        (finish.dequantize)(values.as_chunks().0, &raw, step, mean, &mut residuals);
                    },
                    // SAFETY: see above.
                    Some((TrellisTables::Shared, trellis)) if self.meaning == Meaning::Code => unsafe {
                        let codes = values.as_chunks().0;
                        let states = (trellis, &mut strip.lanes.trellis);
                        (finish.dequantize_trellis)(codes, &raw, states, step, mean, &mut residuals);
                    },
                    Some(trellis) => {
                        let points = self.trellis_points(strip, values, trellis, &raw, run_of_part);
                        for (residual, point) in residuals.iter_mut().zip(points) {
                            *residual = dequantize(point, step, mean).to_le_bytes();
                        }
                    }
                }
                self.scale_columns(&mut residuals);
                self.ended(Stage::RawBits);
                let first = self.first_element(strip) + elements.start;
                let prediction = prediction.map_or(RunPrediction::None, |prediction| {
                    self.prediction_of_run(prediction, run_of_part, first..first + elements.len(), &mut strip.gathered)
                });
                self.round(residuals.as_flattened(), prediction, &mut strip.out[bytes]);
                strip.residuals = residuals;
            }
        }
        strip.bit_planes = bit_planes;
    }

    /// The first element of a strip, counted in the part.
    fn first_element(&self, strip: &Strip<'_>) -> usize {
        self.run_of_part(strip, 0) * self.symbols.run_elements
    }

    /// Multiplies the values of a run by the scales of their columns, where they have some.
    fn scale_columns(&self, residuals: &mut [[u8; 4]]) {
        if let Some(scales) = self.quantizer.and_then(Quantizer::column_scales) {
            // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
            unsafe { (self.kernels.finish.scale_columns)(scales, residuals) }
        }
    }

    /// Rounds residuals, with their prediction added, to elements.
    fn round(&self, residuals: &[u8], prediction: RunPrediction<'_>, out: &mut [u8]) {
        let finish = &self.kernels.finish;
        let round = match self.part.dtype() {
            Dtype::BF16 => finish.round_bf16,
            Dtype::F16 => finish.round_f16,
            _ => finish.round_f32,
        };
        // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
        unsafe { round(residuals.as_chunks().0, prediction, out) }
        self.ended(Stage::Prediction);
    }

    /// The predictor of a run and the reference bytes of its elements, gathered if motion has scattered them; or its
    /// predictions, where they are made of several reference elements: by the same functions on every CPU.
    fn prediction_of_run<'s>(
        &self,
        prediction: &Prediction,
        run: usize,
        elements: Range<usize>,
        gathered: &'s mut Vec<u8>,
    ) -> RunPrediction<'s>
    where
        'a: 's,
    {
        let reference = self.reference.expect("a predicted part is decoded with its reference at hand");
        // The reference of a part that starts from a base begins with the first of the strips.
        let skipped = match self.part.base() {
            Some(_) => self.first_strip * self.symbols.runs_per_strip * self.symbols.run_elements,
            None => 0,
        };
        let bytes_of = |elements: Range<usize>| {
            (elements.start - skipped) * self.element_bytes..(elements.end - skipped) * self.element_bytes
        };
        if let Some(composite) = prediction.composite() {
            let of_tensor = self.part.length_bytes() as usize / self.element_bytes;
            let references = References::new(self.part.dtype(), reference, of_tensor);
            let mut predicted = vec![0.0; elements.len()];
            composite.predict(&references, elements, &mut predicted);
            gathered.clear();
            gathered.extend(predicted.iter().flat_map(|value| value.to_le_bytes()));
            return RunPrediction::Values(gathered.as_chunks().0);
        }
        let predictor = prediction.of_run(run);
        let Some(motion) = &prediction.motion else {
            return RunPrediction::Elementwise(predictor, &reference[bytes_of(elements)]);
        };
        let mut spans = motion.spans(elements.clone());
        if let Some(span) = spans.next()
            && span.len() == elements.len()
        {
            return RunPrediction::Elementwise(predictor, &reference[bytes_of(span)]);
        }
        gathered.resize(elements.len() * self.element_bytes, 0);
        match self.element_bytes {
            2 => gather::<2>(reference, motion, elements, gathered),
            _ => gather::<4>(reference, motion, elements, gathered),
        }
        self.ended(Stage::Placement);
        RunPrediction::Elementwise(predictor, gathered)
    }

    /// Reconstruction points of a run of trellis-coded codes with raw bits below them, in steps.
    fn trellis_points(
        &self,
        strip: &mut Strip<'_>,
        positions: &[u8],
        (tables_in_use, trellis): (TrellisTables, Trellis),
        raw: &RawBits<'_>,
        run: usize,
    ) -> Vec<f32> {
        let number = self.symbols.table_number_of_run(run);
        let tables = self.symbols.tables();
        let pair = match tables_in_use {
            TrellisTables::Shared => [&tables[number]; 2],
            TrellisTables::Pairs => [&tables[2 * number], &tables[2 * number + 1]],
        };
        let [raw_bits] = *raw.planes() else { unreachable!("8 raw bits at most below codes") };
        let mut points = Vec::with_capacity(raw_bits.len());
        for (index, &raw_bits) in raw_bits.iter().enumerate() {
            let lane = index % strip.lanes.count;
            let state = strip.lanes.trellis[lane];
            let in_use = quantizer_of(state);
            let table = pair[usize::from(in_use)];
            let position = match tables_in_use {
                TrellisTables::Shared => positions[2 * index],
                TrellisTables::Pairs => strip.lanes.decode_symbol(lane, strip.words, table),
            };
            let multiple = multiple(join_code(table.code(position), raw_bits.into(), self.symbols.raw_bits), in_use);
            strip.lanes.trellis[lane] = trellis.next_state(state, multiple);
            points.push(multiple as f32 + table.point_offset(position));
        }
        points
    }

    /// Checks that the lanes of a strip came home, and patches its exceptions.
    pub(super) fn end(&self, strip: Strip<'_>) -> Result<(), DecodeError> {
        let Strip { number, layout, stored, lanes, out, .. } = strip;
        lanes.finish(layout.words).map_err(|error| DecodeError::Lanes { strip: number, error })?;
        let (positions, values) = stored[layout.exceptions_range()].split_at(2 * layout.exceptions);
        let mut least = 0;
        for (&position, value) in positions.as_chunks().0.iter().zip(values.chunks(layout.exception_value_bytes)) {
            let position = u16::from_le_bytes(position);
            let index = usize::from(position);
            if index < least || index >= layout.symbols {
                return Err(DecodeError::ExceptionPosition { strip: number, position, symbols: layout.symbols });
            }
            least = index + 1;
            if let Path::Units { units } = self.path {
                replace_unit(units, index, value, out);
                continue;
            }
            self.patch(number, index, value, &mut out[index * self.element_bytes..][..self.element_bytes]);
        }
        if let PartKind::Based(Based { difference: Some(difference), .. }) = self.part.kind() {
            match self.element_bytes {
                1 => self.add_differences(difference, number, out, differences::add::<u8>),
                2 => self.add_differences(difference, number, out, self.kernels.differences.add_16),
                _ => self.add_differences(difference, number, out, differences::add::<u32>),
            }
        }
        Ok(())
    }

    /// Replaces the differences of a strip, in coded order, by its elements.
    fn add_differences(&self, difference: &Difference, strip: usize, out: &mut [u8], add: differences::Add) {
        let reference = self.part.reference_of(strip, self.first_strip, self.reference);
        let reference = reference.expect("a part that starts from a base is decoded with its reference at hand");
        let predicted = self.part.predicted_strip(strip, reference, self.kernels.differences.add_product());
        let first_element = strip * self.symbols.runs_per_strip * self.symbols.run_elements;
        SCRATCH.with_borrow_mut(|(differences, classes)| {
            differences.clear();
            differences.extend_from_slice(out);
            differences.resize(out.len() + differences::PADDING, 0);
            // SAFETY: whoever chose the kernels made sure that the CPU has their instructions.
            unsafe { add(&difference.classes, first_element, &predicted, differences, out, classes) }
        });
        self.ended(Stage::Prediction);
    }

    /// Writes the element that an exception stands for.
    fn patch(&self, strip: usize, index: usize, value: &[u8], out: &mut [u8]) {
        let element = strip * self.symbols.runs_per_strip * self.symbols.run_elements + index;
        let PartKind::Quantized { quantizer, prediction, .. } = self.part.kind() else {
            let carrier = match self.path {
                Path::Split16 { carrier } => carrier,
                _ => Carrier::Own,
            };
            let mut bytes = [0; 8];
            bytes[..value.len()].copy_from_slice(value);
            let element = widen(carrier, u64::from_le_bytes(bytes)).to_le_bytes();
            out.copy_from_slice(&element[..out.len()]);
            return;
        };
        let run = element / self.symbols.run_elements;
        let code = i16::from_le_bytes([value[0], value[1]]);
        let mut residual = dequantize(code.into(), quantizer.step_of_run(run), quantizer.mean_of_run(run));
        if let Some(scales) = quantizer.column_scales() {
            residual *= scales[element % self.symbols.run_elements];
        }
        let residual = residual.to_le_bytes();
        let mut gathered = Vec::new();
        let prediction = prediction.as_ref().map_or(RunPrediction::None, |prediction| {
            self.prediction_of_run(prediction, run, element..element + 1, &mut gathered)
        });
        self.round(&residual, prediction, out);
    }
}

/// Copies the reference elements of `elements`, one after another.
fn gather<const BYTES: usize>(reference: &[u8], motion: &Motion, elements: Range<usize>, gathered: &mut [u8]) {
    let reference = reference.as_chunks::<BYTES>().0;
    let mut rest = gathered.as_chunks_mut::<BYTES>().0;
    if let Some(sources) = motion.single_elements() {
        let mut start = elements.start;
        while !rest.is_empty() {
            let (line, index) = (start / sources.len(), start % sources.len());
            let line = &reference[line * sources.len()..][..sources.len()];
            let (next, later) = rest.split_at_mut((sources.len() - index).min(rest.len()));
            for (element, &source) in next.iter_mut().zip(&sources[index..]) {
                *element = line[source as usize];
            }
            start += next.len();
            rest = later;
        }
        return;
    }
    for span in motion.spans(elements) {
        let (next, later) = rest.split_at_mut(span.len());
        next.copy_from_slice(&reference[span]);
        rest = later;
    }
}
