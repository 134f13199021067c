//! The fast CPU engine: entropy decoding, dequantization, prediction and rounding, run by run, without a pass over memory
//! in between.
//!
//! Kernels are what differs between instruction sets (`kernels`); everything else is written once (`strips`). Which
//! kernels a process uses is chosen in [`super::select`]. Whatever they are, the bytes are the reference decoder's.

mod differences;
mod finish;
mod kernels;
mod portable;
mod raw_bits;
mod stages;
mod strips;
mod units;
mod values;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(test)]
mod tests;

pub use kernels::{Kernels, PORTABLE, WORDS_PADDING};
pub use stages::{Stage, StageClock};

#[cfg(target_arch = "aarch64")]
pub use kernels::NEON;
#[cfg(target_arch = "x86_64")]
pub use kernels::{AVX2, AVX512};

use std::cmp::Reverse;

use super::reference::ReferenceEngine;
use super::{DecodeError, Engine, PreparedPart, StripJob, first_strip};
use crate::decode::prepared::PartKind;
use strips::PartDecoder;

/// An engine made of one level's kernels.
#[derive(Clone, Copy, Debug)]
pub struct CpuEngine {
    kernels: &'static Kernels,
}

impl CpuEngine {
    /// # Safety
    /// The CPU has the instructions of these kernels' level: `super::select` asks it.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(super) unsafe fn new(kernels: &'static Kernels) -> Self {
        Self { kernels }
    }

    /// The engine for any CPU.
    pub fn portable() -> Self {
        Self { kernels: &PORTABLE }
    }

    /// [`Engine::decode_strips`], with the time of each stage added to `clock`.
    pub fn decode_timed(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
        clock: Option<&StageClock>,
    ) -> Result<(), DecodeError> {
        if let Some(clock) = clock {
            clock.start();
        }
        for job in &*jobs {
            part.check_strip(job.strip, job.stored_bytes(part))?;
        }
        if let Some(clock) = clock {
            clock.end(Stage::Checksum);
        }
        if matches!(part.kind(), PartKind::Raw) {
            for job in jobs {
                let stored = job.stored_bytes(part);
                job.out.copy_from_slice(stored);
            }
            return Ok(());
        }
        let is_rare = match part.kind() {
            PartKind::Quantized { quantizer, .. } => quantizer.vectors.is_some(), // an ablation of the paper's
            PartKind::Units { units, .. } => units.has_differences(),             // token numbers and the like: small
            PartKind::Raw | PartKind::Split { .. } | PartKind::Based(_) => false,
        };
        if is_rare {
            for job in jobs {
                ReferenceEngine.decode_strip(part, job.strip, job.stored_bytes(part), reference, job.out)?;
            }
            return Ok(());
        }
        let first = first_strip(jobs);
        if part.based().is_some_and(|based| based.difference.is_none()) {
            for job in jobs {
                let reference = part.reference_of(job.strip, first, reference).expect("it starts from a base");
                let predicted = part.predicted_strip(job.strip, reference, self.kernels.differences.add_product());
                job.out.copy_from_slice(&predicted);
            }
            return Ok(());
        }
        let decoder = PartDecoder::new(self.kernels, part, (reference, first), clock);
        for group in jobs.chunks_mut(self.kernels.strips_at_once) {
            group.sort_by_key(|job| Reverse(job.out.len()));
            match group {
                [a, b, c, d] => decoder.decode([a, b, c, d])?,
                [a, b, c] => decoder.decode([a, b, c])?,
                [a, b] => decoder.decode([a, b])?,
                group => group.iter_mut().try_for_each(|job| decoder.decode([job]))?,
            }
        }
        Ok(())
    }
}

impl Engine for CpuEngine {
    fn name(&self) -> &'static str {
        self.kernels.name
    }

    fn strips_at_once(&self) -> usize {
        self.kernels.strips_at_once
    }

    fn decode_strips(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
    ) -> Result<(), DecodeError> {
        self.decode_timed(part, reference, jobs, None)
    }
}
