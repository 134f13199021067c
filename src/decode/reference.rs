//! The reference decoder: Algorithm 1 read aloud, one symbol after another. It is the oracle every other engine is compared
//! with, so it is written to be read; nothing in it is fast.

use super::prepared::{Difference, PartKind, Prediction, Quantizer, Symbols};
use super::{DecodeError, Engine, PreparedPart, StripJob, first_strip};
use crate::codec::difference::{Bits, coded_order, join_difference};
use crate::codec::entropy::{LaneReader, decode_run};
use crate::codec::lossless::{join_element, widen};
use crate::codec::low_rank::LowRank;
use crate::codec::predictor::references::References;
use crate::codec::quantizer::{dequantize, join_code};
use crate::codec::trellis::{Trellis, multiple, quantizer_of};
use crate::codec::units::{UnitCoding, write_units};
use crate::codec::vector_quantizer::VectorQuantizer;
use crate::format::part::{Carrier, TrellisTables};
use crate::format::strip::{LANES, StripLayout, raw_bytes_of_run};
use crate::numerics::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};
use crate::tensor::Dtype;

/// The portable engine that defines what an archive decodes to.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReferenceEngine;

impl Engine for ReferenceEngine {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn decode_strips(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
    ) -> Result<(), DecodeError> {
        let first = first_strip(jobs);
        jobs.iter_mut().try_for_each(|job| {
            let reference = part.reference_of(job.strip, first, reference);
            decode_strip(part, job.strip, job.stored_bytes(part), reference, job.out)
        })
    }
}

fn decode_strip(
    part: &PreparedPart,
    strip: usize,
    stored: &[u8],
    reference: Option<&[u8]>,
    out: &mut [u8],
) -> Result<(), DecodeError> {
    part.check_strip(strip, stored)?;
    let predicted = part.based().map(|_| {
        let reference = reference.expect("a part that starts from a base is decoded with its reference at hand");
        part.predicted_strip(strip, reference, LowRank::add)
    });
    let Some(layout) = part.layout(strip) else {
        out.copy_from_slice(predicted.as_deref().unwrap_or(stored));
        return Ok(());
    };
    let strip = StripView { number: strip, stored, layout };
    match part.kind() {
        PartKind::Raw => unreachable!("raw parts have no symbol layout"),
        PartKind::Based(based) => {
            let difference = based.difference.as_ref().expect("there are symbols");
            let predicted = predicted.expect("the part starts from a base");
            match part.dtype().bits() {
                Some(8) => strip.decode_differences::<u8>(difference, &predicted, out),
                Some(16) => strip.decode_differences::<u16>(difference, &predicted, out),
                _ => strip.decode_differences::<u32>(difference, &predicted, out),
            }
        }
        PartKind::Split { carrier, carrier_bits, symbols } => strip.decode_split(symbols, *carrier, *carrier_bits, out),
        PartKind::Units { units, symbols } => strip.decode_units(symbols, units, out),
        PartKind::Quantized { symbols, quantizer, prediction } => {
            let prediction = prediction.as_ref().map(|prediction| {
                let reference = reference.expect("a predicted part is decoded with its reference at hand");
                // That of a base begins with the strip.
                let first =
                    if part.base().is_some() { strip.first_run(symbols) * strip.layout.run_elements } else { 0 };
                (prediction, reference, first)
            });
            let of_tensor = part.length_bytes() as usize;
            strip.decode_quantized(symbols, quantizer, prediction, (part.dtype(), of_tensor), out)
        }
    }
}

/// The stored bytes of one strip and where its pieces lie.
struct StripView<'a> {
    number: usize,
    stored: &'a [u8],
    layout: StripLayout,
}

impl StripView<'_> {
    /// The first run of the strip, counted in the part.
    fn first_run(&self, symbols: &Symbols) -> usize {
        self.number * symbols.runs_per_strip
    }

    fn lane_reader(&self) -> LaneReader<'_> {
        LaneReader::new(&self.stored[self.layout.states_range()], &self.stored[self.layout.words_range()])
    }

    /// Entropy-decodes the table position of every symbol.
    fn positions(&self, symbols: &Symbols) -> Result<Vec<u8>, DecodeError> {
        let mut reader = self.lane_reader();
        let mut positions = vec![0; self.layout.symbols];
        for (run, positions) in positions.chunks_mut(self.layout.run_elements).enumerate() {
            decode_run(&mut reader, symbols.table_of_run(self.first_run(symbols) + run), positions);
        }
        reader.finish().map_err(|error| DecodeError::Lanes { strip: self.number, error })?;
        Ok(positions)
    }

    /// The raw bits of every symbol, run after run: whole bytes from the byte planes, the bits above them from the bit planes,
    /// zeros below.
    fn raw(&self, symbols: &Symbols) -> Vec<u64> {
        let mut raw = vec![0; self.layout.symbols];
        let mut rest = &self.stored[self.layout.raw_range()];
        for (run, raw) in raw.chunks_mut(self.layout.run_elements).enumerate() {
            let (stored_bits, zeros) = symbols.stored_raw_bits(self.first_run(symbols) + run);
            let (of_run, later) = rest.split_at(raw_bytes_of_run(raw.len(), stored_bits as usize));
            rest = later;
            let (byte_planes, bit_planes) = of_run.split_at(stored_bits as usize / 8 * raw.len());
            for (plane, bytes) in byte_planes.chunks(raw.len()).enumerate() {
                for (raw, &byte) in raw.iter_mut().zip(bytes) {
                    *raw |= u64::from(byte) << (8 * plane);
                }
            }
            let mut words = bit_planes.as_chunks().0.iter().copied().map(u32::from_le_bytes);
            for vector in raw.chunks_mut(LANES) {
                for bit in stored_bits / 8 * 8..stored_bits {
                    let plane = words.next().expect("a word per vector and bit");
                    for (index, raw) in vector.iter_mut().enumerate() {
                        *raw |= u64::from(plane >> index & 1) << bit;
                    }
                }
            }
            for raw in raw {
                *raw <<= zeros;
            }
        }
        raw
    }

    /// Position and value bytes of every exception, checked to be in order and inside the strip.
    fn exceptions(&self) -> Result<Vec<(usize, &[u8])>, DecodeError> {
        let layout = &self.layout;
        let (positions, values) = self.stored[layout.exceptions_range()].split_at(2 * layout.exceptions);
        let mut exceptions: Vec<(usize, &[u8])> = Vec::with_capacity(layout.exceptions);
        for (&position, value) in positions.as_chunks().0.iter().zip(values.chunks(layout.exception_value_bytes)) {
            let position = u16::from_le_bytes(position);
            let ordered = exceptions.last().is_none_or(|&(before, _)| before < position.into());
            if !ordered || usize::from(position) >= layout.symbols {
                return Err(DecodeError::ExceptionPosition { strip: self.number, position, symbols: layout.symbols });
            }
            exceptions.push((position.into(), value));
        }
        Ok(exceptions)
    }

    fn decode_split(
        &self,
        symbols: &Symbols,
        carrier: Carrier,
        carrier_bits: u32,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let positions = self.positions(symbols)?;
        let raw = self.raw(symbols);
        let mut elements: Vec<u64> = Vec::with_capacity(self.layout.symbols);
        for (index, (&position, &raw)) in positions.iter().zip(&raw).enumerate() {
            let run = self.first_run(symbols) + index / self.layout.run_elements;
            let symbol = symbols.table_of_run(run).code(position) as u16; // modulo 65536
            elements.push(join_element(symbol.into(), raw, carrier_bits, symbols.raw_bits));
        }
        for (position, value) in self.exceptions()? {
            let mut bytes = [0; 8];
            bytes[..value.len()].copy_from_slice(value);
            elements[position] = u64::from_le_bytes(bytes);
        }
        let element_bytes = out.len() / self.layout.symbols;
        for (out, element) in out.chunks_mut(element_bytes).zip(elements) {
            out.copy_from_slice(&widen(carrier, element).to_le_bytes()[..element_bytes]);
        }
        Ok(())
    }

    fn decode_units(&self, symbols: &Symbols, units: &UnitCoding, out: &mut [u8]) -> Result<(), DecodeError> {
        let positions = self.positions(symbols)?;
        let raw = self.raw(symbols);
        let mut numbers: Vec<u64> = Vec::with_capacity(self.layout.symbols);
        for (index, (&position, &raw)) in positions.iter().zip(&raw).enumerate() {
            let run = self.first_run(symbols) + index / self.layout.run_elements;
            numbers.push(units.number(symbols.table_of_run(run).code(position), raw));
        }
        for (position, value) in self.exceptions()? {
            numbers[position] = units.exception(value);
        }
        units.integrate(&mut numbers);
        write_units(&numbers, units.unit_bits(), out);
        Ok(())
    }

    fn decode_differences<T: Bits>(
        &self,
        difference: &Difference,
        predicted: &[u8],
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let symbols = &difference.symbols;
        let positions = self.positions(symbols)?;
        let raw = self.raw(symbols);
        let mut differences: Vec<T> = Vec::with_capacity(self.layout.symbols);
        for (index, (&position, &raw)) in positions.iter().zip(&raw).enumerate() {
            let run = self.first_run(symbols) + index / self.layout.run_elements;
            let (raw_bits, unstored) = symbols.stored_raw_bits(run);
            let symbol = symbols.table_of_run(run).code(position);
            let joined = join_difference(symbol, (raw >> unstored) as u32, raw_bits, difference.zero_bits);
            differences.push(T::truncate(joined));
        }
        for (position, value) in self.exceptions()? {
            differences[position] = T::read(value);
        }
        let mut classes = Vec::new();
        difference.classes.of::<T>(self.first_run(symbols) * self.layout.run_elements, predicted, &mut classes);
        for (element, difference) in coded_order(&classes).into_iter().zip(differences) {
            let bytes = element as usize * T::BYTES..(element as usize + 1) * T::BYTES;
            T::read(&predicted[bytes.clone()]).changed_by(difference).write(&mut out[bytes]);
        }
        Ok(())
    }

    /// Reconstruction points of scalar codes, in steps.
    fn scalar_points(&self, symbols: &Symbols) -> Result<Vec<f32>, DecodeError> {
        let positions = self.positions(symbols)?;
        let raw = self.raw(symbols);
        let point = |(index, (&position, &raw)): (usize, (&u8, &u64))| {
            let table = symbols.table_of_run(self.first_run(symbols) + index / self.layout.run_elements);
            if symbols.raw_bits == 0 {
                return table.points()[usize::from(position)];
            }
            join_code(table.code(position), raw as u32, symbols.raw_bits) as f32
        };
        Ok(positions.iter().zip(&raw).enumerate().map(point).collect())
    }

    /// Reconstruction points of trellis-coded codes, in steps: entropy decoding and trellis go hand in hand, because the
    /// state may choose the table.
    fn trellis_points(
        &self,
        symbols: &Symbols,
        tables: TrellisTables,
        trellis: Trellis,
    ) -> Result<Vec<f32>, DecodeError> {
        let mut reader = self.lane_reader();
        let raw = self.raw(symbols);
        let mut states = [0; LANES];
        let mut points = Vec::with_capacity(self.layout.symbols);
        for (run, raw) in raw.chunks(self.layout.run_elements).enumerate() {
            let run = self.first_run(symbols) + run;
            for (index, &raw) in raw.iter().enumerate() {
                let lane = reader.lane_of(index);
                let state = &mut states[lane];
                let in_use = quantizer_of(*state);
                let table = match tables {
                    TrellisTables::Shared => symbols.table_of_run(run),
                    TrellisTables::Pairs => symbols.table_pair_of_run(run)[usize::from(in_use)],
                };
                let position = reader.decode_symbol(lane, table);
                let code = join_code(table.code(position), raw as u32, symbols.raw_bits);
                let multiple = multiple(code, in_use);
                *state = trellis.next_state(*state, multiple);
                points.push(multiple as f32 + table.point_offset(position)); // exact: 18 bits and 8 more
            }
        }
        reader.finish().map_err(|error| DecodeError::Lanes { strip: self.number, error })?;
        Ok(points)
    }

    /// Points of vectors, in steps: the strip is nothing but the indices of their codewords.
    fn vector_points(&self, vectors: &VectorQuantizer) -> Vec<f32> {
        let mut points = vec![0.0; self.layout.symbols];
        let mut rest = self.stored;
        for points in points.chunks_mut(self.layout.run_elements) {
            let (of_run, later) = rest.split_at(vectors.bytes_of_run(points.len()));
            vectors.points_of_run(of_run, points);
            rest = later;
        }
        points
    }

    fn decode_quantized(
        &self,
        symbols: &Symbols,
        quantizer: &Quantizer,
        prediction: Option<(&Prediction, &[u8], usize)>,
        (dtype, of_tensor): (&Dtype, usize),
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let mut points = match (&quantizer.vectors, quantizer.trellis) {
            (Some(vectors), _) => self.vector_points(vectors),
            (None, None) => self.scalar_points(symbols)?,
            (None, Some((tables, trellis))) => self.trellis_points(symbols, tables, trellis)?,
        };
        for (position, value) in self.exceptions()? {
            points[position] = i16::from_le_bytes([value[0], value[1]]).into();
        }

        let first_element = self.first_run(symbols) * self.layout.run_elements;
        let element_bytes = out.len() / self.layout.symbols;
        // Eq. 70 where a prediction is made of several reference values.
        let composite = prediction.and_then(|(prediction, reference, _)| {
            let (predictor, of_tensor) = (prediction.composite()?, of_tensor / element_bytes);
            let mut predicted = vec![0.0; self.layout.symbols];
            let elements = first_element..first_element + self.layout.symbols;
            predictor.predict(&References::new(dtype, reference, of_tensor), elements, &mut predicted);
            Some(predicted)
        });
        for (index, (out, &point)) in out.chunks_mut(element_bytes).zip(&points).enumerate() {
            let run = self.first_run(symbols) + index / self.layout.run_elements;
            // Eqs. 68-69: the keyframe value or the residual.
            let mut value = dequantize(point, quantizer.step_of_run(run), quantizer.mean_of_run(run));
            if let Some(column_scales) = quantizer.column_scales() {
                value *= column_scales[index % self.layout.run_elements];
            }
            if let Some(predicted) = &composite {
                value += predicted[index]; // Eq. 71
            } else if let Some((prediction, reference, first_of_reference)) = prediction {
                let element = first_element + index;
                let source = prediction
                    .motion
                    .as_ref()
                    .map_or(element - first_of_reference, |motion| motion.reference_of(element));
                let reference = read_element(dtype, &reference[source * element_bytes..][..element_bytes]);
                value += prediction.of_run(run).predict(reference); // Eqs. 70-71
            }
            write_element(dtype, value, out);
        }
        Ok(())
    }
}

/// A decoded element as the predictor sees it: the deployed weight.
fn read_element(dtype: &Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::BF16 => f32_from_bf16(u16::from_le_bytes([bytes[0], bytes[1]])),
        Dtype::F16 => f32_from_f16(u16::from_le_bytes([bytes[0], bytes[1]])),
        _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

fn write_element(dtype: &Dtype, value: f32, out: &mut [u8]) {
    match dtype {
        Dtype::BF16 => out.copy_from_slice(&bf16_from_f32(value).to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16_from_f32(value).to_le_bytes()),
        _ => out.copy_from_slice(&value.to_le_bytes()),
    }
}
