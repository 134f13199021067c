//! Assignment of many blocks: screening, greed, and one pass of swaps (section 4.4).
//!
//! Each block keeps its most similar candidates, 16 by default; all these pairs, the most similar first, are taken as long as both
//! sides are free. What is left is screened again, and matched exactly once it is few. Then each block tries to
//! change places with the block that holds a candidate it would rather have.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::blocks::{BlockVectors, Level};
use super::{EXACT_BLOCKS, hungarian, similarity};

/// A swap must gain more than the rounding of the cosines.
const LEAST_GAIN: f32 = 1e-6;

/// A block of the previous layer, and how similar it is.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    similarity: f32,
    block: u32,
}

/// For each block of `current` the block of `previous` it goes with. So many candidates are kept, and swapped where asked
/// for; of equal pairs the one with the lower rank comes first.
pub(super) fn assign(
    current: &BlockVectors<'_>,
    previous: &BlockVectors<'_>,
    (candidates_kept, is_refined): (usize, bool),
    ranks: &[u32],
) -> Vec<u32> {
    let blocks = current.symmetry().groups;
    let (mut left, mut left_below): (Vec<u32>, Vec<u32>) = ((0..blocks).collect(), (0..blocks).collect());
    let mut matched: Vec<Option<Candidate>> = vec![None; blocks as usize];
    let first = screen(current, &left, previous, &left_below, candidates_kept);
    let mut candidates = first.clone();
    while left.len() > EXACT_BLOCKS {
        take_greedily(&left, &candidates, ranks, &mut matched);
        left.retain(|&block| matched[block as usize].is_none());
        let mut free = vec![true; blocks as usize];
        for candidate in matched.iter().flatten() {
            free[candidate.block as usize] = false;
        }
        left_below.retain(|&block| free[block as usize]);
        if left.len() > EXACT_BLOCKS {
            candidates = screen(current, &left, previous, &left_below, candidates_kept); // ends: each round matches one pair at least
        }
    }
    if !left.is_empty() {
        let cosines = similarity::cosines_among(current, &left, previous, &left_below);
        for (row, column) in hungarian::assign(&cosines).into_iter().enumerate() {
            let similarity = cosines[(row, column as usize)];
            matched[left[row] as usize] = Some(Candidate { similarity, block: left_below[column as usize] });
        }
    }
    let mut matched: Vec<Candidate> = matched.into_iter().map(|found| found.expect("every block is matched")).collect();
    if is_refined {
        swap_once(&first, &mut matched, |block, below| {
            let pair = similarity::cosines_among(current, &[block], previous, &[below]);
            pair[(0, 0)]
        });
    }
    matched.into_iter().map(|candidate| candidate.block).collect()
}

/// The most similar blocks of `of_previous` for each block of `of_current`, the most similar first.
fn screen(
    current: &BlockVectors<'_>,
    of_current: &[u32],
    previous: &BlockVectors<'_>,
    of_previous: &[u32],
    kept: usize,
) -> Vec<Vec<Candidate>> {
    let tile = similarity::tile_rows(current.width(Level::Groups));
    let screened: Vec<Vec<Vec<Candidate>>> = of_current
        .par_chunks(tile)
        .map(|rows| {
            let rows = similarity::unit_rows(current, rows);
            let mut best: Vec<Vec<Candidate>> = vec![Vec::with_capacity(kept + 1); rows.nrows()];
            for columns in of_previous.chunks(tile) {
                let cosines = similarity::products(&rows, &similarity::unit_rows(previous, columns));
                for (best, cosines) in best.iter_mut().zip(cosines.rows()) {
                    for (&similarity, &block) in cosines.iter().zip(columns) {
                        keep(best, Candidate { similarity, block }, kept);
                    }
                }
            }
            best
        })
        .collect();
    screened.into_iter().flatten().collect()
}

/// Adds a candidate to a list sorted by similarity, unless the list is full of better ones.
fn keep(best: &mut Vec<Candidate>, candidate: Candidate, most: usize) {
    let full = best.len() == most;
    if full && best[most - 1].similarity >= candidate.similarity {
        return;
    }
    let place = best.partition_point(|kept| kept.similarity >= candidate.similarity);
    best.insert(place, candidate);
    best.truncate(most);
}

/// Takes pairs from the most similar down, as long as both blocks are free. Equal pairs come in the order of ranks.
fn take_greedily(blocks: &[u32], candidates: &[Vec<Candidate>], ranks: &[u32], matched: &mut [Option<Candidate>]) {
    let mut pairs: Vec<(u32, Candidate)> = blocks
        .iter()
        .zip(candidates)
        .flat_map(|(&block, candidates)| candidates.iter().map(move |&candidate| (block, candidate)))
        .collect();
    pairs.sort_unstable_by(|(a, one), (b, other)| {
        let by_similarity = other.similarity.partial_cmp(&one.similarity).unwrap_or(Ordering::Equal);
        let rank = |&block: &u32| ranks[block as usize];
        by_similarity.then(rank(a).cmp(&rank(b))).then(rank(&one.block).cmp(&rank(&other.block)))
    });
    let mut free = vec![true; matched.len()];
    for candidate in matched.iter().flatten() {
        free[candidate.block as usize] = false;
    }
    for (block, candidate) in pairs {
        let (mine, theirs) = (&mut matched[block as usize], &mut free[candidate.block as usize]);
        if mine.is_none() && *theirs {
            *mine = Some(candidate);
            *theirs = false;
        }
    }
}

/// One pass over all blocks: a block takes a candidate it prefers, and the block that held it takes its own, if the two
/// together gain.
fn swap_once(candidates: &[Vec<Candidate>], matched: &mut [Candidate], similarity: impl Fn(u32, u32) -> f32) {
    let mut holder = vec![0; matched.len()];
    for (block, candidate) in matched.iter().enumerate() {
        holder[candidate.block as usize] = block;
    }
    for block in 0..matched.len() {
        for &wanted in &candidates[block] {
            let mine = matched[block];
            if wanted.similarity <= mine.similarity {
                break; // sorted: no later one is better
            }
            let other = holder[wanted.block as usize];
            let theirs = Candidate { similarity: similarity(other as u32, mine.block), block: mine.block };
            let gain = wanted.similarity + theirs.similarity - mine.similarity - matched[other].similarity;
            if gain > LEAST_GAIN {
                (matched[block], matched[other]) = (wanted, theirs);
                (holder[wanted.block as usize], holder[theirs.block as usize]) = (block, other);
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(similarities: &[(f32, u32)]) -> Vec<Candidate> {
        similarities.iter().map(|&(similarity, block)| Candidate { similarity, block }).collect()
    }

    #[test]
    fn the_best_candidates_are_kept_in_order() {
        let mut best = Vec::new();
        for block in 0..40u32 {
            keep(&mut best, Candidate { similarity: (block * 7 % 40) as f32, block }, 16);
        }
        let kept: Vec<f32> = best.iter().map(|candidate| candidate.similarity).collect();
        let expected: Vec<f32> = (24..40u8).rev().map(f32::from).collect();
        assert_eq!(kept, expected);
    }

    #[test]
    fn a_swap_mends_what_greed_lost() {
        // Greed gives block 0 its 0.9 and leaves block 1 with 0.1; exchanged they have 0.8 and 0.85.
        let scores = [[0.9, 0.8], [0.85, 0.1]];
        let lists = [candidates(&[(0.9, 0), (0.8, 1)]), candidates(&[(0.85, 0), (0.1, 1)])];
        let mut matched = vec![None; 2];
        take_greedily(&[0, 1], &lists, &[0, 1], &mut matched);
        let mut matched: Vec<_> = matched.into_iter().flatten().collect();
        assert_eq!(matched.iter().map(|candidate| candidate.block).collect::<Vec<_>>(), [0, 1]);
        swap_once(&lists, &mut matched, |block, below| scores[block as usize][below as usize]);
        assert_eq!(matched.iter().map(|candidate| candidate.block).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(matched[0].similarity, 0.8);
    }
}
