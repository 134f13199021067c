//! The engine: calls become launches, and what a device cannot do the CPU does.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::batch::{self, Batch, Launches, STATUS_BYTES, supports};
use super::device::{Device, DeviceError};
use super::slots::Slots;
use crate::decode::{DecodeError, Engine, PreparedPart, StripJob, first_strip};

/// Calls that are on a device at a time: one copies to it, one decodes, one copies back, and one has its checksums looked at.
const SLOTS: usize = 4;

/// With less memory for each a device is of no use: a strip of the widest type with its reference, and what describes it.
const LEAST_SLOT_BYTES: u64 = 4 << 20;

/// Strips that one call decodes best: a quarter of what fills the largest devices, so that all slots together do.
const STRIPS_AT_ONCE: usize = 256;

/// Decodes on a device, and on the CPU where that cannot.
#[derive(Debug)]
pub struct CudaEngine {
    device: Arc<dyn Device>,
    slots: Slots,
    slot_bytes: usize,
    cpu: Arc<dyn Engine>,
    /// The device has failed: it is left alone from then on.
    is_lost: AtomicBool,
    has_lacked_memory: AtomicBool,
}

/// What a call takes of memory.
struct Plan {
    /// Strips of the part that are described: those of the jobs and all between them.
    strips: Range<usize>,
    /// Bytes of the reference that are sent.
    reference: Range<usize>,
    batch_bytes: usize,
    room_bytes: usize,
    output_bytes: usize,
}

impl Plan {
    fn device_bytes(&self) -> usize {
        self.sent_bytes() + self.output_bytes + self.room_bytes
    }

    /// The batch lies behind the reference.
    fn sent_bytes(&self) -> usize {
        self.reference.len().next_multiple_of(256) + self.batch_bytes.next_multiple_of(256)
    }
}

impl CudaEngine {
    /// An engine that takes `memory_bytes` of the device at most, and as much of the host's for the copies; what the device
    /// cannot do goes to `cpu`.
    pub fn new(device: Arc<dyn Device>, memory_bytes: u64, cpu: Arc<dyn Engine>) -> Result<Self, DeviceError> {
        let name = device.name().to_owned();
        let available = memory_bytes.min(device.free_bytes()?);
        let slot_bytes = available / SLOTS as u64;
        if slot_bytes < LEAST_SLOT_BYTES {
            return Err(DeviceError::Memory { device: name, bytes: SLOTS * LEAST_SLOT_BYTES as usize });
        }
        let slot_bytes = usize::try_from(slot_bytes).unwrap_or(usize::MAX);
        let slots = Slots::new(&device, SLOTS, slot_bytes)?;
        let (is_lost, has_lacked_memory) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { device, slots, slot_bytes, cpu, is_lost, has_lacked_memory })
    }

    /// Whether the device has failed, so that everything is decoded by the CPU.
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    fn plan(part: &PreparedPart, has_reference: bool, jobs: &[StripJob<'_>]) -> Plan {
        let numbers = || jobs.iter().map(|job| job.strip);
        let strips = numbers().min().unwrap_or(0)..numbers().max().map_or(0, |last| last + 1);
        let of_strips: usize = numbers().map(|strip| batch::strip_bytes(part, strip)).sum();
        Plan {
            reference: if has_reference { referenced_bytes(part, strips.clone()) } else { 0..0 },
            batch_bytes: batch::part_bytes(part, strips.clone()) + of_strips,
            room_bytes: numbers().map(|strip| batch::room_bytes(part, strip)).sum(),
            output_bytes: jobs.iter().map(|job| job.out.len().next_multiple_of(OUT_ALIGNMENT)).sum(),
            strips,
        }
    }

    /// Decodes as many of the first jobs as fit; how many those were, none where one alone does not fit.
    fn decode_some(
        &self,
        part: &PreparedPart,
        (reference, first): (Option<&[u8]>, usize),
        jobs: &mut [StripJob<'_>],
    ) -> Result<(usize, Result<(), DecodeError>), DeviceError> {
        let mut count = jobs.len();
        let plan = loop {
            let plan = Self::plan(part, reference.is_some(), &jobs[..count]);
            if plan.device_bytes() <= self.slot_bytes {
                break plan;
            }
            count /= 2;
            if count == 0 {
                return Ok((0, Ok(())));
            }
        };
        let reference = reference.map(|reference| sent_reference(part, first, reference, &plan));
        Ok((count, self.decode_planned(part, reference, &mut jobs[..count], &plan)?))
    }

    /// Copies, launches, copies back.
    fn decode_planned(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
        plan: &Plan,
    ) -> Result<Result<(), DecodeError>, DeviceError> {
        let mut slot = self.slots.take();
        let (stream, memory, staging) = slot.memory(plan.device_bytes(), plan.device_bytes())?;
        let (sent, received) = staging.split_at_mut(plan.sent_bytes());
        let outputs = memory.address() + sent.len() as u64;

        let (of_reference, of_batch) = sent.split_at_mut(plan.reference.len().next_multiple_of(256));
        if let Some(reference) = reference {
            of_reference[..reference.len()].copy_from_slice(reference);
        }
        let element_0 = memory.address().wrapping_sub(plan.reference.start as u64);
        let batch_address = memory.address() + of_reference.len() as u64;
        let mut batch = Batch::new(of_batch, batch_address, outputs + plan.output_bytes as u64);
        let placed = batch.add_part(part, plan.strips.clone());
        let mut out = 0;
        for (number, job) in jobs.iter().enumerate() {
            let stored = job.stored_bytes(part);
            batch.add_strip(placed, (part, job.strip), stored, outputs + out as u64, element_0, number);
            out += job.out.len().next_multiple_of(OUT_ALIGNMENT);
        }
        let Launches { bytes, launches, statuses, keys } = batch.finish();
        let sent_bytes = plan.reference.len().next_multiple_of(256) + bytes;
        let (outs, status_bytes) = received.split_at_mut(plan.output_bytes);
        let status_bytes = &mut status_bytes[..keys.len() * STATUS_BYTES];
        let number = stream.number();
        let mut work = || {
            // SAFETY: all of it lies in the slot's memory, which nobody else has; it is neither given back nor looked at
            // before the stream is done, which is waited for whatever happens. The batch is that of a part checked and
            // strips whose lengths are the part's.
            unsafe {
                self.device.upload(number, memory.address(), &sent[..sent_bytes])?;
                launches.iter().try_for_each(|&launch| self.device.launch(number, launch))?;
                self.device.download(number, outs, outputs)?;
                self.device.download(number, status_bytes, statuses)
            }
        };
        let given = work();
        stream.synchronize().and(given)?;

        let mut out = 0;
        for job in jobs.iter_mut() {
            job.out.copy_from_slice(&outs[out..out + job.out.len()]);
            out += job.out.len().next_multiple_of(OUT_ALIGNMENT);
        }
        for (status, job) in status_bytes.as_chunks().0.iter().zip(keys) {
            match batch::failure(part, jobs[job].strip, status) {
                Ok(None) => {}
                Ok(Some(error)) => return Ok(Err(error)),
                Err(error) => {
                    let (device, reason) = (self.device.name().to_owned(), error.to_string());
                    return Err(DeviceError::Failed { device, operation: "decoding", reason });
                }
            }
        }
        Ok(Ok(()))
    }

    /// Says once that a device fails, and whether it may be asked again.
    fn note(&self, error: &DeviceError) {
        let said_before = match error {
            DeviceError::Memory { .. } => self.has_lacked_memory.swap(true, Ordering::Relaxed),
            DeviceError::Absent(_) | DeviceError::Failed { .. } => self.is_lost.swap(true, Ordering::Relaxed),
        };
        if !said_before {
            log::warn!("engine: {} instead of cuda: {error}", self.cpu.name());
        }
    }
}

/// Outputs of strips begin on multiples of this on the device.
const OUT_ALIGNMENT: usize = 16;

/// Bytes of the reference tensor that strips need: their own, or the lines that their blocks come from.
fn referenced_bytes(part: &PreparedPart, strips: Range<usize>) -> Range<usize> {
    let bytes = part.output_range(strips);
    let bytes = bytes.start as usize..bytes.end as usize;
    let Some(motion) = part.prediction().and_then(|prediction| prediction.motion.as_ref()) else { return bytes };
    let element_bytes = part.symbol_bits() / 8;
    let elements = motion.lines_around(bytes.start / element_bytes..bytes.end / element_bytes);
    elements.start * element_bytes..elements.end * element_bytes
}

/// The plan's part of a reference that was given for strips from number `first` on.
fn sent_reference<'r>(part: &PreparedPart, first: usize, reference: &'r [u8], plan: &Plan) -> &'r [u8] {
    let start = if part.base().is_some() { part.output_range(first..first + 1).start as usize } else { 0 };
    &reference[plan.reference.start - start..plan.reference.end - start]
}

impl Engine for CudaEngine {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn strips_at_once(&self) -> usize {
        if self.is_lost() { self.cpu.strips_at_once() } else { STRIPS_AT_ONCE }
    }

    fn decode_strips(
        &self,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        jobs: &mut [StripJob<'_>],
    ) -> Result<(), DecodeError> {
        if self.is_lost() || !supports(part) {
            return self.cpu.decode_strips(part, reference, jobs);
        }
        for job in &*jobs {
            part.check_strip(job.strip, job.stored_bytes(part))?;
        }
        let first = first_strip(jobs);
        jobs.sort_by_key(|job| job.strip);
        let mut rest = jobs;
        while !rest.is_empty() {
            let on_cpu = match self.decode_some(part, (reference, first), rest) {
                Ok((0, _)) => 1,
                Ok((decoded, result)) => {
                    result?;
                    rest = &mut rest[decoded..];
                    continue;
                }
                Err(error) => {
                    self.note(&error);
                    rest.len()
                }
            };
            let (of_cpu, later) = rest.split_at_mut(on_cpu);
            let reference = match part.base() {
                Some(_) => part.reference_of(of_cpu[0].strip, first, reference),
                None => reference,
            };
            self.cpu.decode_strips(part, reference, of_cpu)?;
            rest = later;
        }
        Ok(())
    }
}
