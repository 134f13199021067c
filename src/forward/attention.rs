//! Attention of every head of every sequence, and its gradients.

use std::ops::Range;

use ndarray::{Array2, ArrayRef2, ArrayView2, s};
use rayon::prelude::*;

use super::rotary::{Angles, Rotary, Turn};

/// What attention needs beside its projections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    pub heads: usize,
    /// Keys and values that several queries share.
    pub key_value_heads: usize,
    /// Width of a head.
    pub width: usize,
    pub rotary: Option<Rotary>,
    pub is_causal: bool,
    /// Positions that a token sees back, itself counted.
    pub window: Option<usize>,
    pub layout: ProjectionLayout,
}

/// Where queries, keys and values lie in what was projected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProjectionLayout {
    /// `[tokens, heads * width]` each.
    Split,
    /// `[tokens, heads * 3 * width]`: of each head its query, key and value.
    PerHead,
    /// `[tokens, 3 * heads * width]`: all queries, all keys, all values.
    Joined,
}

/// Queries, keys or values.
#[derive(Clone, Copy)]
enum Role {
    Query,
    Key,
    Value,
}

impl Attention {
    /// Columns that each projection gives.
    pub(super) fn projected_columns(&self) -> Vec<usize> {
        let (queries, others) = (self.heads * self.width, self.key_value_heads * self.width);
        match self.layout {
            ProjectionLayout::Split => vec![queries, others, others],
            ProjectionLayout::PerHead | ProjectionLayout::Joined => vec![queries + 2 * others],
        }
    }

    /// The projection that one head's queries, keys or values are in, and their columns in it.
    fn place(&self, role: Role, head: usize) -> (usize, Range<usize>) {
        let which = role as usize;
        let (projection, first) = match self.layout {
            ProjectionLayout::Split => (which, head),
            ProjectionLayout::PerHead => (0, 3 * head + which),
            ProjectionLayout::Joined => {
                let before = [0, self.heads, self.heads + self.key_value_heads][which];
                (0, before + head)
            }
        };
        (projection, first * self.width..(first + 1) * self.width)
    }

    /// What every token gathers: `[tokens, heads * width]`. Sequences do not see one another.
    pub(super) fn apply(&self, projected: &[&Array2<f32>], sequences: &[Range<usize>]) -> Array2<f32> {
        let tokens = sequences.last().map_or(0, |sequence| sequence.end);
        let angles = self.angles(sequences);
        let of_sequences: Vec<Array2<f32>> = (sequences.par_iter())
            .map(|tokens| OfSequence { attention: self, projected, tokens, angles: angles.as_ref() }.gathered())
            .collect();
        let mut gathered = Array2::zeros((tokens, self.heads * self.width));
        for (sequence, rows) in sequences.iter().zip(of_sequences) {
            gathered.slice_mut(s![sequence.clone(), ..]).assign(&rows);
        }
        gathered
    }

    /// The gradients of what was projected, from that of what was gathered.
    pub(super) fn gradients(
        &self,
        projected: &[&Array2<f32>],
        sequences: &[Range<usize>],
        of_gathered: &Array2<f32>,
    ) -> Vec<Array2<f32>> {
        let angles = self.angles(sequences);
        let of_sequences: Vec<Vec<Array2<f32>>> = (sequences.par_iter())
            .map(|tokens| {
                let sequence = OfSequence { attention: self, projected, tokens, angles: angles.as_ref() };
                sequence.gradients(&of_gathered.slice(s![tokens.clone(), ..]))
            })
            .collect();
        let mut gradients: Vec<Array2<f32>> =
            projected.iter().map(|projected| Array2::zeros(projected.raw_dim())).collect();
        for (sequence, of_sequence) in sequences.iter().zip(of_sequences) {
            for (gradient, rows) in gradients.iter_mut().zip(of_sequence) {
                gradient.slice_mut(s![sequence.clone(), ..]).assign(&rows);
            }
        }
        gradients
    }

    fn angles(&self, sequences: &[Range<usize>]) -> Option<Angles> {
        let longest = sequences.iter().map(Range::len).max().unwrap_or(0);
        self.rotary.map(|rotary| rotary.angles(longest))
    }
}

/// One sequence.
struct OfSequence<'a> {
    attention: &'a Attention,
    projected: &'a [&'a Array2<f32>],
    tokens: &'a Range<usize>,
    angles: Option<&'a Angles>,
}

impl OfSequence<'_> {
    fn head(&self, role: Role, head: usize) -> ArrayView2<'_, f32> {
        let (projection, columns) = self.attention.place(role, head);
        self.projected[projection].slice(s![self.tokens.clone(), columns])
    }

    fn rotated(&self, role: Role, head: usize) -> Array2<f32> {
        let mut rows = self.head(role, head).to_owned();
        if let Some(angles) = self.angles {
            angles.rotate(rows.view_mut(), Turn::Forward);
        }
        rows
    }

    /// Number of the key and value head that a query head shares.
    fn shared(&self, head: usize) -> usize {
        head / (self.attention.heads / self.attention.key_value_heads)
    }

    fn score_scale(&self) -> f32 {
        1.0 / (self.attention.width as f32).sqrt()
    }

    /// What every token takes of every other: `[tokens, tokens]`, rows that sum to 1.
    fn shares(&self, queries: &Array2<f32>, keys: &Array2<f32>) -> Array2<f32> {
        let mut scores = queries.dot(&keys.t());
        scores *= self.score_scale();
        for (position, mut row) in scores.rows_mut().into_iter().enumerate() {
            let last = if self.attention.is_causal { position + 1 } else { self.tokens.len() };
            let first = self.attention.window.map_or(0, |window| (position + 1).saturating_sub(window));
            row.slice_mut(s![..first]).fill(0.0);
            row.slice_mut(s![last..]).fill(0.0);
            let mut seen = row.slice_mut(s![first..last]);
            let greatest = seen.fold(f32::NEG_INFINITY, |greatest, &score| greatest.max(score));
            seen.mapv_inplace(|score| (score - greatest).exp());
            let sum = seen.fold(0.0, |sum, share| sum + share);
            seen /= sum;
        }
        scores
    }

    fn gathered(&self) -> Array2<f32> {
        let Attention { heads, key_value_heads, width, .. } = *self.attention;
        let mut gathered = Array2::zeros((self.tokens.len(), heads * width));
        let keys: Vec<Array2<f32>> = (0..key_value_heads).map(|head| self.rotated(Role::Key, head)).collect();
        for head in 0..heads {
            let shared = self.shared(head);
            let shares = self.shares(&self.rotated(Role::Query, head), &keys[shared]);
            let values = self.head(Role::Value, shared);
            gathered.slice_mut(s![.., head * width..(head + 1) * width]).assign(&shares.dot(&values));
        }
        gathered
    }

    /// With P the shares and G the gradient of what a head gathered: that of its values is P^T G; that of its scores
    /// P (D - rowsum(P D)) with D = G V^T, elementwise; queries and keys follow from the scores as in any product.
    fn gradients(&self, of_gathered: &ArrayRef2<f32>) -> Vec<Array2<f32>> {
        let Attention { heads, key_value_heads, width, .. } = *self.attention;
        let tokens = self.tokens.len();
        let mut gradients: Vec<Array2<f32>> =
            self.projected.iter().map(|projected| Array2::zeros((tokens, projected.ncols()))).collect();
        let mut of_keys = vec![Array2::<f32>::zeros((tokens, width)); key_value_heads];
        let keys: Vec<Array2<f32>> = (0..key_value_heads).map(|head| self.rotated(Role::Key, head)).collect();
        for head in 0..heads {
            let shared = self.shared(head);
            let queries = self.rotated(Role::Query, head);
            let shares = self.shares(&queries, &keys[shared]);
            let of_head = of_gathered.slice(s![.., head * width..(head + 1) * width]);
            let (projection, columns) = self.attention.place(Role::Value, shared);
            let mut of_values = gradients[projection].slice_mut(s![.., columns]);
            of_values += &shares.t().dot(&of_head);
            let mut of_scores = of_head.dot(&self.head(Role::Value, shared).t());
            for (mut row, shares) in of_scores.rows_mut().into_iter().zip(shares.rows()) {
                let mean = row.dot(&shares);
                row.zip_mut_with(&shares, |of_score, share| *of_score = (*of_score - mean) * share);
            }
            of_scores *= self.score_scale();
            of_keys[shared] += &of_scores.t().dot(&queries);
            self.place_rotated(&mut gradients, Role::Query, head, of_scores.dot(&keys[shared]));
        }
        for (head, of_keys) in of_keys.into_iter().enumerate() {
            self.place_rotated(&mut gradients, Role::Key, head, of_keys);
        }
        gradients
    }

    /// Puts the gradient of rotated queries or keys where they were projected.
    fn place_rotated(&self, gradients: &mut [Array2<f32>], role: Role, head: usize, mut of_rotated: Array2<f32>) {
        if let Some(angles) = self.angles {
            angles.rotate(of_rotated.view_mut(), Turn::Back);
        }
        let (projection, columns) = self.attention.place(role, head);
        gradients[projection].slice_mut(s![.., columns]).assign(&of_rotated);
    }
}

#[cfg(test)]
mod tests {
    use super::super::rotary::RotaryScaling;
    use super::*;

    #[test]
    fn gradients_are_differences_of_what_is_gathered() {
        let rotary = Some(Rotary { width: 2, base: 100.0, scaling: RotaryScaling::None });
        let base = Attention {
            heads: 4,
            key_value_heads: 2,
            width: 4,
            rotary,
            is_causal: true,
            window: Some(3),
            layout: ProjectionLayout::Split,
        };
        let joined = ProjectionLayout::Joined;
        let per_head = ProjectionLayout::PerHead;
        for attention in [
            base,
            Attention { is_causal: false, window: None, layout: joined, ..base },
            Attention { key_value_heads: 4, rotary: None, window: None, layout: per_head, ..base },
        ] {
            let random = &mut fastrand::Rng::with_seed(3);
            let mut rows = |columns| Array2::from_shape_fn((9, columns), |_| 2.0 * random.f32() - 1.0);
            let projected: Vec<Array2<f32>> = attention.projected_columns().into_iter().map(&mut rows).collect();
            let of_gathered = rows(16);
            let sequences = [0..4, 4..9];
            let value = |projected: &[Array2<f32>]| -> f64 {
                let gathered = attention.apply(&projected.iter().collect::<Vec<_>>(), &sequences);
                gathered.iter().zip(&of_gathered).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let gradients = attention.gradients(&projected.iter().collect::<Vec<_>>(), &sequences, &of_gathered);
            const STEP: f32 = 1.0 / 128.0;
            for (which, gradient) in gradients.iter().enumerate() {
                for (place, &found) in gradient.indexed_iter() {
                    let moved = |by: f32| {
                        let mut projected = projected.clone();
                        projected[which][place] += by;
                        value(&projected)
                    };
                    let expected = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                    assert!((f64::from(found) - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{found}, {expected}");
                }
            }
        }
    }
}
