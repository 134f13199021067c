//! One step of the search, for all lanes and states: written once where compilers vectorize it, compiled per instruction
//! set, and by hand where they do not. All arithmetic is single binary32 operations in one order, so that every level finds
//! the same path.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;

use super::{PRICED, Prices};
use crate::codec::trellis::Trellis;
use crate::format::strip::LANES;
use crate::numerics::nearest_integer;

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

    /// Takes a step.
    pub fn take(self, step: Step<'_>) {
        match self {
            Self::Portable => step.take(select_portable),
            // SAFETY: `all_of_this_cpu` has seen that the CPU has the instructions, here and below.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if step.lanes <= LANES / 2 => unsafe { avx2::<{ LANES / 2 }>(step) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::<LANES>(step) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if step.lanes <= LANES / 2 => unsafe { avx512::<{ LANES / 2 }>(step) },
            // SAFETY: see above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::<LANES>(step) },
        }
    }
}

/// One symbol of every lane: what each residue costs, and the cheapest way to every state. `costs`, `next` and `by_odd_code`
/// are by state.
#[derive(Debug)]
pub struct Step<'a> {
    /// Which states lead to which.
    pub trellis: Trellis,
    /// Lanes that matter: those after them may come out as anything.
    pub lanes: usize,
    /// What is to be met, in steps.
    pub targets: &'a [f32; LANES],
    /// What codes cost.
    pub prices: &'a Prices,
    /// To be found.
    pub branches: &'a mut Branches,
    /// The cheapest ways to the states before this symbol.
    pub costs: &'a [Costs],
    /// To be found: those after it.
    pub next: &'a mut [Costs],
    /// To be found: the lanes that enter a state by an odd code.
    pub by_odd_code: &'a mut [u32],
}

impl Step<'_> {
    /// `select` puts the lesser of two sums into its last argument and gives the lanes where it is the second.
    #[inline(always)]
    fn take(self, select: impl Fn([&Costs; 2], [&Costs; 2], &mut Costs) -> u32) {
        price(self.targets, self.prices, self.branches);
        let to_states = self.next.iter_mut().zip(self.by_odd_code);
        for (state, (next, by_odd_code)) in (0..).zip(to_states) {
            let [even, odd] = [0, 1].map(|odd| {
                let from = self.trellis.previous_state(state, odd);
                [&self.costs[usize::from(from)], &self.branches.costs[usize::from(2 * odd + (from & 1))]]
            });
            *by_odd_code = select(even, odd, next);
        }
    }
}

/// The cheapest multiple of each residue: the nearest, or the next one towards zero if its code is so much shorter. One
/// simple loop over all lanes after the other: that becomes vector instructions, all in one loop does not.
#[inline(always)]
fn price(targets: &[f32; LANES], prices: &Prices, branches: &mut Branches) {
    for residue in 0..RESIDUES {
        let quantizer = residue & 1;
        let (least, greatest) = prices.bounds[quantizer];
        let residue_steps = residue as i32;
        let (mut nearest, mut shorter) = ([0; LANES], [0; LANES]);
        for ((nearest, shorter), &target) in nearest.iter_mut().zip(&mut shorter).zip(targets) {
            let inside = target.max(least).min(greatest);
            *nearest = residue_steps + 4 * nearest_integer((inside - residue_steps as f32) * 0.25);
            *shorter = *nearest - 4 * nearest.signum();
        }
        let [of_nearest, of_shorter] = [&nearest, &shorter].map(|multiples| {
            let (below, of_code) = (prices.below[quantizer], &prices.of_code[quantizer]);
            let index = multiples.map(|multiple| {
                let code = (multiple - quantizer as i32) >> 1;
                ((code >> prices.raw_bits) - below).clamp(0, PRICED as i32 - 1)
            });
            let mut costs = index.map(|index| of_code[index as usize % PRICED]);
            for ((cost, &target), &multiple) in costs.iter_mut().zip(targets).zip(multiples) {
                let error = target - multiple as f32;
                *cost += error * error;
            }
            costs
        });
        let (multiples, costs) = (&mut branches.multiples[residue], &mut branches.costs[residue].0);
        for lane in 0..LANES {
            // From 1 or 2 the next one towards zero is beyond it, and no shorter.
            let is_shorter = shorter[lane].abs() < nearest[lane].abs();
            let is_better = is_shorter & (of_shorter[lane] < of_nearest[lane]);
            multiples[lane] = if is_better { shorter[lane] } else { nearest[lane] };
            costs[lane] = if is_better { of_shorter[lane] } else { of_nearest[lane] };
        }
    }
}

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

/// A step with registers of some lanes: how to load, add, take the lesser, store, and tell where the second is the lesser.
#[cfg(target_arch = "x86_64")]
macro_rules! step_with_registers {
    ($name:ident, $features:literal, $lanes:literal, $load:ident, $add:ident, $min:ident, $store:ident, $is_less:expr) => {
        #[target_feature(enable = $features)]
        fn $name<const IN_USE: usize>(step: Step<'_>) {
            step.take(|even, odd, next| {
                let mut lanes = 0;
                for first in (0..IN_USE).step_by($lanes) {
                    // SAFETY: whole registers of lanes are all of them, or half.
                    let load = |costs: &Costs| unsafe { $load(costs.0.as_ptr().add(first)) };
                    let [by_even, by_odd] = [even, odd].map(|[from, branch]| $add(load(from), load(branch)));
                    // SAFETY: see above.
                    unsafe { $store(next.0.as_mut_ptr().add(first), $min(by_odd, by_even)) };
                    lanes |= $is_less(by_odd, by_even) << first;
                }
                lanes
            });
        }
    };
}

#[cfg(target_arch = "x86_64")]
step_with_registers!(avx2, "avx2", 8, _mm256_loadu_ps, _mm256_add_ps, _mm256_min_ps, _mm256_storeu_ps, |a, b| {
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) as u32
});

#[cfg(target_arch = "x86_64")]
step_with_registers!(
    avx512,
    "avx512f,avx512vl,avx2",
    16,
    _mm512_loadu_ps,
    _mm512_add_ps,
    _mm512_min_ps,
    _mm512_storeu_ps,
    |a, b| u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
);
