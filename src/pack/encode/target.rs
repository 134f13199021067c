//! Meeting the target: a first step found on estimates, then whole encodings until the serialized archive is what was asked
//! for (section 6.2).

use std::io::{BufWriter, Write};
use std::path::Path;

use super::super::options::Target;
use super::super::rate::{StepSearch, gaussian_step};
use super::super::record::{Drafted, Treatment};
use super::compare::Compared;
use super::{Encoder, PackError, Scan, WriteError, Written, write_index};

/// Finest rate of the quantizer: 61 coded positions above eight raw bits, less what tails need.
const MOST_BITS: f64 = 12.0;
/// A met target is this near, relative.
const RATE_TOLERANCE: f64 = 0.004;
/// Encodings of the whole checkpoint until the target must be met.
const ENCODINGS: usize = 5;

impl Encoder<'_> {
    /// The step to start encoding with, found on estimates.
    pub(super) fn first_step(&self) -> Result<(f64, Scan), PackError> {
        let (quantized, energy) = if self.has_quantized() { self.quantized_energy() } else { (0, 0.0) };
        if quantized == 0 || energy == 0.0 {
            if let Target::BitsPerParameter(wanted) = self.options.target {
                log::warn!("--bpp {wanted}: no tensor of this checkpoint may be quantized; packing it bit-exact");
            }
            return Ok((1.0, self.scan(1.0)));
        }
        let parameters = self.checkpoint.parameters() as f64;
        let rms = (energy / quantized as f64).sqrt();
        match self.options.target {
            Target::Lossless => Ok((1.0, self.scan(1.0))),
            Target::BitsPerParameter(wanted) => {
                if wanted > MOST_BITS {
                    let reason = format!("more than the {MOST_BITS} that quantization offers; pack it --lossless");
                    return Err(PackError::Rate { wanted, reason });
                }
                let fixed = self.fixed_bits();
                let budget = wanted * parameters - fixed;
                let least = 0.1 * quantized as f64;
                if budget < least {
                    let needed = (fixed + least) / parameters;
                    let reason = format!(
                        "tensors that are always bit-exact and the headers leave too little: at least {needed:.2} is needed"
                    );
                    return Err(PackError::Rate { wanted, reason });
                }
                let mut step = gaussian_step(rms, budget / quantized as f64);
                let mut search = StepSearch::new(budget, -(quantized as f64));
                let mut scan = self.scan(step);
                for _ in 0..6 {
                    let bits = self.body_bits(&scan);
                    if (bits - budget).abs() < 0.001 * budget {
                        break;
                    }
                    step = search.next(step, bits);
                    scan = self.scan(step);
                }
                Ok((step, scan))
            }
            Target::RelativeSquaredError(wanted) => {
                let mut step = rms * (12.0 * wanted).sqrt();
                let mut search = StepSearch::new(wanted.log2(), 2.0);
                let mut scan = self.scan(step);
                for _ in 0..6 {
                    let error = (scan.squared_error / scan.energy).max(f64::MIN_POSITIVE).log2();
                    if (error - wanted.log2()).abs() < 0.002 {
                        break;
                    }
                    step = search.next(step, error);
                    scan = self.scan(step);
                }
                Ok((step, scan))
            }
        }
    }

    /// Estimated bits of all quantized bodies.
    fn body_bits(&self, scan: &Scan) -> f64 {
        let parts = self.treatments.iter().flatten().zip(scan.part_bits.iter().flatten());
        parts.filter(|(treatment, _)| matches!(treatment, Treatment::Quantized { .. })).map(|(_, bits)| bits).sum()
    }

    /// Bits of what does not change with the step: bit-exact tensors, headers, strips' own costs.
    fn fixed_bits(&self) -> f64 {
        let pool = self.exact_classes.fit();
        let mut bits = 8.0 * 4096.0;
        for file in &self.checkpoint.files {
            bits += 8.0 * file.header.bytes.len() as f64 / 6.0; // as deflate leaves it
        }
        for (record, treatments) in self.plan.records.iter().zip(&self.treatments) {
            for (part, &treatment) in record.parts.iter().zip(treatments) {
                let (tensor, bytes) = self.tensor(part.file, part.tensor);
                bits += 8.0 * 40.0 + tensor.elements() as f64 / 65_536.0 * 8.0 * 140.0;
                if !matches!(treatment, Treatment::Quantized { .. }) {
                    bits += Drafted::new(treatment, tensor, bytes, 1.0, self.options).estimate(&pool);
                }
            }
        }
        bits
    }

    /// Encodes until the target is met on what was serialized.
    pub(super) fn settle(
        &self,
        file: &mut std::fs::File,
        step: f64,
        scan: Scan,
        out: &Path,
    ) -> Result<(Written, Compared, Option<String>), PackError> {
        let output = |source| PackError::Output { path: out.to_owned(), source };
        let (mut step, mut scan) = (step, scan);
        let parameters = self.checkpoint.parameters() as f64;
        let mut search = match self.options.target {
            Target::BitsPerParameter(wanted) => StepSearch::new(wanted * parameters, -(scan.quantized as f64)),
            Target::RelativeSquaredError(wanted) => StepSearch::new((wanted * 0.9985).log2(), 2.0),
            Target::Lossless => StepSearch::new(0.0, 1.0),
        };
        for attempt in 1.. {
            file.set_len(0).map_err(output)?;
            let mut buffered = BufWriter::with_capacity(1 << 20, &mut *file);
            let written = self.write_records(&mut buffered, step, &scan.pool).map_err(|error| match error {
                WriteError::Io(source) => output(source),
                WriteError::SelfCheck(error) => PackError::SelfCheck(error),
            })?;
            buffered.flush().map_err(output)?;
            drop(buffered);
            let bytes = write_index(file, &written.index, written.bytes).map_err(output)?;
            let settled = scan.quantized == 0 || attempt == ENCODINGS;
            match self.options.target {
                Target::BitsPerParameter(wanted) if scan.quantized > 0 => {
                    let bits = 8.0 * bytes as f64;
                    let off = (bits / (wanted * parameters) - 1.0).abs();
                    if off < RATE_TOLERANCE || settled {
                        let missed = (off >= 0.01)
                            .then(|| format!("{:.3} bits per parameter after {attempt} encodings", bits / parameters));
                        return Ok((written, self.compare(file, out)?, missed));
                    }
                    step = search.next(step, bits);
                }
                Target::RelativeSquaredError(wanted) if scan.quantized > 0 => {
                    let compared = self.compare(file, out)?;
                    let (squared_error, energy) = self.quantized_error(&compared);
                    let error = if energy > 0.0 { squared_error / energy } else { 0.0 };
                    if (error <= wanted && error > wanted * (1.0 - RATE_TOLERANCE)) || settled {
                        let missed = (error > wanted)
                            .then(|| format!("relative squared error {error:.3e} after {attempt} encodings"));
                        return Ok((written, compared, missed));
                    }
                    step = search.next(step, error.max(f64::MIN_POSITIVE).log2());
                }
                _ => return Ok((written, self.compare(file, out)?, None)),
            }
            scan = self.scan(step);
        }
        unreachable!("the last attempt returns")
    }
}
