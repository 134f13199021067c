//! Motion compensation: which block of the layer below each block is predicted from (section 4, Appendix A).
//!
//! Blocks are compared by the cosine of their weights (Eq. 1), biases excluded: with the bias inside the block even
//! shuffled weights look alike; where asked for, by what they do on calibration inputs or by the energy that a scaled copy
//! leaves (section 4.2, 4.3). Up to 256 blocks are matched exactly, more by screening and greed. The result is the same
//! for any number of threads. Writing a permutation is `codec::permutation`; whether it pays is for the mode decision.

mod blocks;
mod hungarian;
mod residuals;
mod screened_greedy;
mod similarity;

use rayon::prelude::*;

pub use blocks::{BlockVectors, Half, VectorsError};
pub use residuals::{MAGNITUDE_BINS, MAGNITUDES_PER_DEVIATION, Magnitudes, residual_magnitudes};
pub use similarity::{PairStatistics, compare};

use crate::codec::architecture::BlockType;
use crate::codec::permutation::{GroupedPermutation, Permutation};

/// Up to this many blocks are matched exactly.
pub const EXACT_BLOCKS: usize = 256;

/// With more blocks than this in groups of several, which is more query heads than any model has, nothing is moved.
const MOST_GROUPED_BLOCKS: u32 = 1024;

/// How permutations are chosen; all but `Similarity` are the paper's ablations (Tables 14 and 15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alignment {
    /// No permutation.
    None,
    /// A permutation by chance, the same for the same seed.
    Random {
        /// What the chance starts from.
        seed: u64,
    },
    /// Greatest similarity, FFN units only.
    FfnOnly,
    /// Greatest similarity, attention heads only.
    HeadsOnly,
    /// Greatest similarity (Eq. 2).
    #[default]
    Similarity,
}

/// How an assignment is solved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Solver {
    /// Exactly up to [`EXACT_BLOCKS`], else screened.
    #[default]
    Auto,
    /// Exactly, whatever it takes.
    Exact,
    /// Screened and greedy.
    Screened {
        /// Candidates kept per block.
        candidates: usize,
        /// Whether blocks may change places afterwards.
        is_refined: bool,
    },
}

impl Solver {
    /// As the paper has it.
    pub const SCREENED: Self = Self::Screened { candidates: 16, is_refined: true };

    /// What solves so many blocks: candidates and refinement where it is not exact.
    fn screening(self, blocks: usize) -> Option<(usize, bool)> {
        match self {
            Self::Exact => None,
            Self::Screened { candidates, is_refined } => Some((candidates, is_refined)),
            Self::Auto if blocks <= EXACT_BLOCKS => None,
            Self::Auto => Self::SCREENED.screening(blocks),
        }
    }
}

/// How permutations are found, in full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Method {
    /// By which rule.
    pub alignment: Alignment,
    /// How the assignment is solved.
    pub solver: Solver,
    /// Decides between equally similar blocks; their order where there is none.
    pub tie_seed: Option<u64>,
}

impl From<Alignment> for Method {
    fn from(alignment: Alignment) -> Self {
        Self { alignment, ..Self::default() }
    }
}

/// The permutation that predicts `current` from `previous`, the same record one layer below: block `i` goes with block
/// `p[i]` of `previous`. `layer` tells chances apart.
///
/// # Panics
/// When the two do not have the same symmetry and shapes: the caller has asked
/// [`RecordPlan::follows`](crate::codec::architecture::RecordPlan::follows).
pub fn align(
    method: impl Into<Method>,
    block_type: BlockType,
    layer: u32,
    previous: &BlockVectors<'_>,
    current: &BlockVectors<'_>,
) -> GroupedPermutation {
    assert_eq!(previous.symmetry(), current.symmetry(), "blocks of one symmetry");
    let method = method.into();
    let symmetry = current.symmetry();
    let identity = || GroupedPermutation::identity(symmetry).expect("checked when the blocks were made");
    match (method.alignment, block_type) {
        (Alignment::None, _) => identity(),
        (Alignment::FfnOnly, _) if block_type.is_attention() => identity(),
        (Alignment::HeadsOnly, _) if !block_type.is_attention() => identity(),
        (Alignment::Random { seed }, _) => {
            let stream = u64::from(layer) << 8 | u64::from(block_type.number());
            let mut chance = fastrand::Rng::with_seed(seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut shuffled = |len: u32| {
                let mut entries: Vec<u32> = (0..len).collect();
                chance.shuffle(&mut entries);
                bijection(entries)
            };
            let outer = shuffled(symmetry.groups);
            let inner = (0..symmetry.groups).map(|_| shuffled(symmetry.members)).collect();
            GroupedPermutation::new(outer, inner).expect("checked when the blocks were made")
        }
        (Alignment::FfnOnly | Alignment::HeadsOnly | Alignment::Similarity, _) => {
            by_similarity(method, previous, current)
        }
    }
}

fn by_similarity(method: Method, previous: &BlockVectors<'_>, current: &BlockVectors<'_>) -> GroupedPermutation {
    let symmetry = current.symmetry();
    if symmetry.members == 1 {
        let blocks = symmetry.groups as usize;
        let ranks = ranks(method.tie_seed, blocks as u32);
        let outer = match method.solver.screening(blocks) {
            None => assign_by_rank(&similarity::cosines(current, previous), &ranks),
            Some(screening) => screened_greedy::assign(current, previous, screening, &ranks),
        };
        return GroupedPermutation::free(bijection(outer)).expect("checked when the blocks were made");
    }
    if symmetry.groups * symmetry.members > MOST_GROUPED_BLOCKS {
        return GroupedPermutation::identity(symmetry).expect("checked when the blocks were made");
    }
    // Every pair of groups has its own best matching of members; groups are matched by what that gives (Eq. 129).
    let products = similarity::GroupProducts::of(current, previous);
    let groups = symmetry.groups as usize;
    let matched: Vec<(f32, Vec<u32>)> =
        (0..groups * groups).into_par_iter().map(|pair| products.match_members(pair / groups, pair % groups)).collect();
    let scores = ndarray::Array2::from_shape_fn((groups, groups), |(i, j)| matched[i * groups + j].0);
    let outer = hungarian::assign(&scores);
    let inner = outer.iter().enumerate().map(|(group, &below)| matched[group * groups + below as usize].1.clone());
    let inner = inner.map(bijection).collect();
    GroupedPermutation::new(bijection(outer), inner).expect("checked when the blocks were made")
}

/// Which block comes first of equally similar ones: the lower rank.
fn ranks(seed: Option<u64>, blocks: u32) -> Vec<u32> {
    let mut ranks: Vec<u32> = (0..blocks).collect();
    if let Some(seed) = seed {
        fastrand::Rng::with_seed(seed).shuffle(&mut ranks);
    }
    ranks
}

/// The exact assignment, rows and columns taken in the order of their ranks.
fn assign_by_rank(scores: &ndarray::Array2<f32>, ranks: &[u32]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_unstable_by_key(|&block| ranks[block]);
    let ordered = ndarray::Array2::from_shape_fn(scores.dim(), |(row, column)| scores[(order[row], order[column])]);
    let mut assigned = vec![0; order.len()];
    for (row, column) in hungarian::assign(&ordered).into_iter().enumerate() {
        assigned[order[row]] = order[column as usize] as u32;
    }
    assigned
}

/// An assignment as a permutation.
fn bijection(entries: Vec<u32>) -> Permutation {
    Permutation::new(entries).expect("an assignment uses each block once")
}

#[cfg(test)]
mod tests;
