//! Two models' outputs beside one another, row by row.

use std::ops::Range;

use ndarray::ArrayView1;
use rayon::prelude::*;

use super::BeforeAfter;
use crate::forward::pass::Outputs;

/// Logits held at once, of each model: 64 MiB.
const LOGITS: usize = 1 << 24;

/// What comparing logits found.
#[derive(Default)]
pub(super) struct ComparedLogits {
    /// Kullback-Leibler divergence of each row, nats.
    pub(super) divergences: Vec<f64>,
    /// Rows with the same likeliest class.
    agreeing: usize,
    /// `-ln p(target)` of rows that have a target, of both models.
    losses: Vec<[f64; 2]>,
    /// How many of these have the target as their likeliest class.
    hits: [usize; 2],
}

impl ComparedLogits {
    /// Share of rows with the same likeliest class.
    pub(super) fn agreement(&self) -> f64 {
        self.agreeing as f64 / self.divergences.len().max(1) as f64
    }

    /// Mean of `-ln p(target)`; `None` where no row has a target.
    pub(super) fn mean_loss(&self) -> Option<BeforeAfter> {
        self.of_targets(|which| self.losses.iter().map(|loss| loss[which]).sum())
    }

    /// Share of targets that are the likeliest class; `None` where no row has one.
    pub(super) fn accuracy(&self) -> Option<BeforeAfter> {
        self.of_targets(|which| self.hits[which] as f64)
    }

    fn of_targets(&self, sum: impl Fn(usize) -> f64) -> Option<BeforeAfter> {
        let count = self.losses.len() as f64;
        (count > 0.0).then(|| BeforeAfter { before: sum(0) / count, after: sum(1) / count })
    }
}

/// Of one row.
struct ComparedRow {
    divergence: f64,
    likeliest: [usize; 2],
    /// `-ln p(target)` of both.
    loss: Option<[f64; 2]>,
}

/// Compares distributions: `sum p ln(p / q)` where p is the original's softmax and q the decoded model's.
pub(super) fn compare_logits(before: &Outputs, after: &Outputs, targets: &[Option<usize>], found: &mut ComparedLogits) {
    let at_once = (LOGITS / before.width().max(1)).max(1);
    for start in (0..before.count()).step_by(at_once) {
        let range = start..before.count().min(start + at_once);
        let (p, q) = (before.rows(range.clone()), after.rows(range.clone()));
        let rows: Vec<ComparedRow> = (0..range.len())
            .into_par_iter()
            .map(|row| compare_row(&p.row(row), &q.row(row), targets[start + row]))
            .collect();
        for (row, target) in rows.iter().zip(&targets[range]) {
            found.divergences.push(row.divergence);
            found.agreeing += usize::from(row.likeliest[0] == row.likeliest[1]);
            found.losses.extend(row.loss);
            for (hits, likeliest) in found.hits.iter_mut().zip(row.likeliest) {
                *hits += usize::from(*target == Some(likeliest));
            }
        }
    }
}

fn compare_row(p: &ArrayView1<'_, f32>, q: &ArrayView1<'_, f32>, target: Option<usize>) -> ComparedRow {
    let (p_normalizer, q_normalizer) = (log_sum_exp(p), log_sum_exp(q));
    let divergence: f64 = (p.iter().zip(q))
        .map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - p_normalizer, f64::from(q) - q_normalizer);
            p.exp() * (p - q)
        })
        .sum();
    ComparedRow {
        divergence: divergence.max(0.0), // below only by rounding
        likeliest: [likeliest(p), likeliest(q)],
        loss: target.map(|target| [p_normalizer - f64::from(p[target]), q_normalizer - f64::from(q[target])]),
    }
}

fn log_sum_exp(logits: &ArrayView1<'_, f32>) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

/// The first of the largest.
fn likeliest(logits: &ArrayView1<'_, f32>) -> usize {
    let first = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    first.map_or(0, |(index, _)| index)
}

/// 1 - cosine of each sequence's mean hidden state, or of each row where rows are images.
pub(super) fn compare_embeddings(
    before: &Outputs,
    after: &Outputs,
    sequences: &[Range<usize>],
    rows_are_images: bool,
) -> Vec<f64> {
    let of = |outputs: &Outputs, range: Range<usize>| -> Vec<f64> {
        let mut sum = vec![0.0; outputs.width()];
        for row in outputs.rows(range).outer_iter() {
            sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        sum // the mean has the same direction
    };
    let images: Vec<Range<usize>> = (0..before.count()).map(|row| row..row + 1).collect();
    let ranges = if rows_are_images { &images } else { sequences };
    ranges.iter().map(|range| one_minus_cosine(&of(before, range.clone()), &of(after, range.clone()))).collect()
}

/// From the difference of unit vectors, which loses nothing where they are close.
fn one_minus_cosine(a: &[f64], b: &[f64]) -> f64 {
    let norm = |vector: &[f64]| vector.iter().map(|value| value * value).sum::<f64>().sqrt();
    let (of_a, of_b) = (norm(a), norm(b));
    if of_a == 0.0 || of_b == 0.0 {
        return if of_a == of_b { 0.0 } else { 1.0 };
    }
    0.5 * a.iter().zip(b).map(|(a, b)| (a / of_a - b / of_b).powi(2)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn the_divergence_of_two_coins_is_what_it_is_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): 0.5 ln 2 + 0.5 ln (2/3).
        let (p, q) = (array![1.0_f32, 1.0], array![0.0_f32, 3.0_f32.ln()]);
        let row = compare_row(&p.view(), &q.view(), Some(1));
        assert!((row.divergence - 0.5 * (4.0_f64 / 3.0).ln()).abs() < 1e-7, "{}", row.divergence);
        assert_eq!(row.likeliest, [0, 1], "the first of equals");
        let [before, after] = row.loss.expect("a target");
        assert!((before - 2.0_f64.ln()).abs() < 1e-7 && (after - (4.0_f64 / 3.0).ln()).abs() < 1e-7);
    }

    #[test]
    fn the_same_logits_however_large_do_not_diverge() {
        let logits = array![1e4_f32, -3.0, 9_999.0];
        assert_eq!(compare_row(&logits.view(), &logits.view(), None).divergence, 0.0);
    }

    #[test]
    fn cosines_are_those_of_the_angle() {
        assert!((one_minus_cosine(&[1.0, 0.0], &[0.0, 2.0]) - 1.0).abs() < 1e-12);
        assert!(one_minus_cosine(&[3.0, 4.0], &[6.0, 8.0]).abs() < 1e-12);
        assert!((one_minus_cosine(&[1.0, 0.0], &[1.0, 1e-6]) - 0.5e-12).abs() < 1e-16);
        assert_eq!(one_minus_cosine(&[0.0], &[0.0]), 0.0);
    }
}
