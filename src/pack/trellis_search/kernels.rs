//! One step of the search, for all lanes and states: written once where compilers vectorize it, compiled per instruction
//! set, and by hand where they do not. All arithmetic is single binary32 operations in one order, so that every level finds
//! the same path.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;

use super::{PRICED, Prices};
use crate::codec::trellis::Trellis;
use crate::format::strip::LANES;

/// The residues of a multiple modulo 4: `2 parity of its code + quantizer`.
const RESIDUES: usize = 4;

/// A number for each lane.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Costs(pub [f32; LANES]);

/// Per residue and lane, the multiple that stands for it and what it costs.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Branches {
    /// In steps.
    pub multiples: [[i32; LANES]; RESIDUES],
    /// In squared steps.
    pub costs: [Costs; RESIDUES],
}

impl Branches {
    /// To be overwritten.
    pub const NONE: Self = Self { multiples: [[0; LANES]; RESIDUES], costs: [Costs([0.0; LANES]); RESIDUES] };
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Any CPU.
    Portable,
    /// x86-64 with AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// All that this CPU has, the best first.
    pub fn all_of_this_cpu() -> impl Iterator<Item = Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                levels.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") {
                levels.push(Self::Avx2);
            }
        }
        levels.push(Self::Portable);
        levels.into_iter()
    }
}

impl Level {
    /// The best that this CPU has.
    pub fn of_this_cpu() -> Self {
        Self::all_of_this_cpu().next().unwrap_or(Self::Portable)
    }

    /// One symbol of every lane: what each residue costs, and the cheapest way to every state. `costs` and `next` are by
    /// state; so is `by_odd_code`, the lanes that enter the state by an odd code.
    #[allow(clippy::too_many_arguments)]
    pub fn step(
        self,
        trellis: Trellis,
        targets: &[f32; LANES],
        prices: &Prices,
        branches: &mut Branches,
        costs: &[Costs],
        next: &mut [Costs],
        by_odd_code: &mut [u32],
    ) {
        match self {
            Self::Portable => {
                price(targets, prices, branches);
                select(trellis, &branches.costs, costs, next, by_odd_code, select_portable);
            }
            // SAFETY: `all_of_this_cpu` has seen that the CPU has the instructions, here and below.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { step_avx2(trellis, targets, prices, branches, costs, next, by_odd_code) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { step_avx512(trellis, targets, prices, branches, costs, next, by_odd_code) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn step_avx2(
    trellis: Trellis,
    targets: &[f32; LANES],
    prices: &Prices,
    branches: &mut Branches,
    costs: &[Costs],
    next: &mut [Costs],
    by_odd_code: &mut [u32],
) {
    price(targets, prices, branches);
    let cheaper = |even: [&Costs; 2], odd: [&Costs; 2], next: &mut Costs| select_avx2(even, odd, next);
    select(trellis, &branches.costs, costs, next, by_odd_code, cheaper);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2")]
fn step_avx512(
    trellis: Trellis,
    targets: &[f32; LANES],
    prices: &Prices,
    branches: &mut Branches,
    costs: &[Costs],
    next: &mut [Costs],
    by_odd_code: &mut [u32],
) {
    price(targets, prices, branches);
    let cheaper = |even: [&Costs; 2], odd: [&Costs; 2], next: &mut Costs| select_avx512(even, odd, next);
    select(trellis, &branches.costs, costs, next, by_odd_code, cheaper);
}

/// The cheapest multiple of each residue: the nearest, or the next one towards zero if its code is so much shorter.
#[inline(always)]
fn price(targets: &[f32; LANES], prices: &Prices, branches: &mut Branches) {
    for residue in 0..RESIDUES {
        let quantizer = residue & 1;
        let (least, greatest) = prices.bounds[quantizer];
        let (below, of_code) = (prices.below[quantizer], &prices.of_code[quantizer]);
        let residue_steps = residue as i32;
        let cost_of = |target: f32, multiple: i32| {
            let error = target - multiple as f32;
            let code = (multiple - quantizer as i32) >> 1;
            let index = ((code >> prices.raw_bits) - below).clamp(0, PRICED as i32 - 1) as usize;
            error * error + of_code[index % PRICED]
        };
        let (multiples, costs) = (&mut branches.multiples[residue], &mut branches.costs[residue].0);
        for ((&target, multiple), cost) in targets.iter().zip(multiples).zip(costs) {
            let inside = target.max(least).min(greatest);
            let nearest = residue_steps + 4 * ((inside - residue_steps as f32) * 0.25).round_ties_even() as i32;
            let shorter = nearest - 4 * nearest.signum();
            let (of_nearest, of_shorter) = (cost_of(target, nearest), cost_of(target, shorter));
            // From 1 or 2 the next one towards zero is beyond it, and no shorter.
            let is_better = shorter.abs() < nearest.abs() && of_shorter < of_nearest;
            *multiple = if is_better { shorter } else { nearest };
            *cost = if is_better { of_shorter } else { of_nearest };
        }
    }
}

/// The cheapest way to every state, from the two that lead to it.
#[inline(always)]
fn select(
    trellis: Trellis,
    branches: &[Costs; RESIDUES],
    costs: &[Costs],
    next: &mut [Costs],
    by_odd_code: &mut [u32],
    cheaper: impl Fn([&Costs; 2], [&Costs; 2], &mut Costs) -> u32,
) {
    for (state, (next, by_odd_code)) in (0..).zip(next.iter_mut().zip(by_odd_code)) {
        let [even, odd] = [0, 1].map(|odd| {
            let from = trellis.previous_state(state, odd);
            [&costs[usize::from(from)], &branches[usize::from(2 * odd + (from & 1))]]
        });
        *by_odd_code = cheaper(even, odd, next);
    }
}

/// The lesser of two sums, and the lanes where it is the second.
fn select_portable(even: [&Costs; 2], odd: [&Costs; 2], next: &mut Costs) -> u32 {
    let mut lanes = 0;
    for (lane, next) in next.0.iter_mut().enumerate() {
        let (by_even, by_odd) = (even[0].0[lane] + even[1].0[lane], odd[0].0[lane] + odd[1].0[lane]);
        let is_odd = by_odd < by_even;
        *next = if is_odd { by_odd } else { by_even };
        lanes |= u32::from(is_odd) << lane;
    }
    lanes
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn select_avx2(even: [&Costs; 2], odd: [&Costs; 2], next: &mut Costs) -> u32 {
    let mut lanes = 0;
    for register in 0..LANES / 8 {
        // SAFETY: four registers of eight lanes are all of them.
        let load = |costs: &Costs| unsafe { _mm256_loadu_ps(costs.0.as_ptr().add(8 * register)) };
        let [by_even, by_odd] = [even, odd].map(|[from, branch]| _mm256_add_ps(load(from), load(branch)));
        let is_odd = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(by_odd, by_even)) as u32;
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(next.0.as_mut_ptr().add(8 * register), _mm256_min_ps(by_odd, by_even)) };
        lanes |= is_odd << (8 * register);
    }
    lanes
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn select_avx512(even: [&Costs; 2], odd: [&Costs; 2], next: &mut Costs) -> u32 {
    let mut lanes = 0;
    for register in 0..LANES / 16 {
        // SAFETY: two registers of sixteen lanes are all of them.
        let load = |costs: &Costs| unsafe { _mm512_loadu_ps(costs.0.as_ptr().add(16 * register)) };
        let [by_even, by_odd] = [even, odd].map(|[from, branch]| _mm512_add_ps(load(from), load(branch)));
        let is_odd = u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(by_odd, by_even));
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(next.0.as_mut_ptr().add(16 * register), _mm512_min_ps(by_odd, by_even)) };
        lanes |= is_odd << (16 * register);
    }
    lanes
}
