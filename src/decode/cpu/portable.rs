//! Entropy decoding on any CPU: one lookup per symbol, no branch that depends on data.

use super::kernels::{Output, RunJob};
use crate::format::strip::LANES;

/// The kernel of every [`TableUse`](super::kernels::TableUse), given as its number.
///
/// # Safety
/// None needed: it is a safe function behind the type that kernels have.
pub unsafe fn run<const TABLE_USE: usize, O: Output>(jobs: &mut [RunJob<'_, O>]) {
    for job in jobs {
        match job.lanes.count {
            LANES => run_of_one_strip::<TABLE_USE, O>(job, LANES), // a constant: the loop over lanes is laid out for it
            fewer => run_of_one_strip::<TABLE_USE, O>(job, fewer),
        }
    }
}

/// Has `whole_vectors` decode as many whole vectors of 32 symbols as the jobs start with, and decodes what is left of them.
#[inline(always)]
pub fn with_rest<const TABLE_USE: usize, O: Output>(
    jobs: &mut [RunJob<'_, O>],
    whole_vectors: impl Fn(&mut [RunJob<'_, O>], usize),
) {
    let symbols = jobs.first().map_or(0, |job| job.out.len());
    assert!(jobs.iter().all(|job| job.out.len() == symbols), "runs in lockstep are equally long");
    let whole = symbols / LANES * LANES;
    if whole > 0 {
        whole_vectors(jobs, whole);
    }
    if whole < symbols {
        for job in jobs {
            let RunJob { words, tables, values, trellis, raw, .. } = *job;
            let out = &mut job.out[whole..];
            let mut rest = RunJob { lanes: &mut *job.lanes, words, tables, values, trellis, raw, out };
            run_of_one_strip::<TABLE_USE, O>(&mut rest, LANES);
        }
    }
}

#[inline(always)]
fn run_of_one_strip<const TABLE_USE: usize, O: Output>(job: &mut RunJob<'_, O>, lanes: usize) {
    let slots = job.tables.map(|table| &table.slots().0);
    let odd = job.tables.map(|table| &table.decoding().odd);
    let mut states: [u32; LANES] = std::array::from_fn(|lane| job.lanes.state(lane));
    let mut used = job.lanes.used;
    for vector in job.out.chunks_mut(lanes) {
        let states = states.iter_mut().zip(&mut job.lanes.trellis);
        for (out, (state, trellis)) in vector.iter_mut().zip(states) {
            let quantizer = if TABLE_USE == 0 { 0 } else { usize::from(*trellis % 2) };
            let table = if TABLE_USE == 2 { quantizer } else { 0 };
            let entry = slots[table][(*state % 4096) as usize];
            let position = (entry >> 24) as usize;
            // No overflow: at most (2^20 - 1) * 4095 + 4095.
            let next = (*state >> 12) * (entry & 0xfff) + (entry >> 12 & 0xfff);
            // The word is read whether it is needed or not: a branch here would be mispredicted for every third symbol.
            let refilled = next << 16 | u32::from(job.words.word(used));
            let refill = next < 1 << 16;
            *state = if refill { refilled } else { next };
            used += usize::from(refill);
            *out = O::of(job.values, quantizer, position);
            if TABLE_USE > 0 {
                *trellis = job.trellis.next_state(*trellis, i32::from(odd[table][position % 64] & 2));
            }
        }
    }
    for (lane, state) in states.into_iter().enumerate() {
        job.lanes.set_state(lane, state);
    }
    job.lanes.used = used;
}
