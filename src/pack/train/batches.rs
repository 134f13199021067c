//! Calibration inputs in batches: most to train on, in an order that a seed decides, and the last of them held out.

use ndarray::Axis;

use crate::forward::inputs::Inputs;

/// Tokens of a piece of text, where text may be cut: attention to more takes longer and teaches little more.
const PIECE_TOKENS: usize = 128;
/// One of so many inputs is held out.
const HELD_OUT_SHARE: usize = 8;
/// Tokens that an image counts for.
const IMAGE_TOKENS: usize = 197;

/// Inputs, and which of them come next.
pub struct Batches {
    inputs: Inputs,
    batch_tokens: usize,
    /// Numbers of the inputs that are trained on come first.
    trained: usize,
    random: fastrand::Rng,
    /// Numbers of inputs that this round has not seen.
    left: Vec<usize>,
}

impl Batches {
    /// Batches of about so many tokens. Text may be cut where tokens see those before them only: a piece has a beginning then,
    /// whichever it is.
    pub fn new(inputs: &Inputs, may_be_cut: bool, batch_tokens: usize, seed: u64) -> Self {
        let inputs = match inputs {
            Inputs::Tokens(sequences) if may_be_cut => {
                let pieces = sequences.iter().flat_map(|sequence| sequence.chunks(PIECE_TOKENS));
                Inputs::Tokens(pieces.map(<[u32]>::to_vec).collect())
            }
            inputs => inputs.clone(),
        };
        // With a single input there is nothing to hold out.
        let held_out = inputs.count().div_ceil(HELD_OUT_SHARE).min(inputs.count() - 1);
        let trained = inputs.count() - held_out;
        Self { inputs, batch_tokens, trained, random: fastrand::Rng::with_seed(seed), left: Vec::new() }
    }

    /// The next batch to train on: every input once, then all of them again in another order.
    pub fn next_batch(&mut self) -> Inputs {
        let numbers = self.next_numbers();
        self.chosen(&numbers)
    }

    /// Passes over a batch.
    pub fn skip(&mut self) {
        self.next_numbers();
    }

    fn next_numbers(&mut self) -> Vec<usize> {
        let (mut chosen, mut tokens) = (Vec::new(), 0);
        while tokens < self.batch_tokens && chosen.len() < self.trained {
            if self.left.is_empty() {
                self.left = (0..self.trained).collect();
                self.random.shuffle(&mut self.left);
            }
            let number = self.left.pop().expect("there is an input to train on");
            tokens += self.tokens_of(number);
            chosen.push(number);
        }
        chosen
    }

    /// Batches of what is never trained on; of a single input, that.
    pub fn held_out(&self) -> impl Iterator<Item = Inputs> {
        let numbers: Vec<usize> = (self.trained..self.inputs.count()).collect();
        let numbers = if numbers.is_empty() { vec![0] } else { numbers };
        let mut batches: Vec<Vec<usize>> = Vec::new();
        let mut tokens = self.batch_tokens;
        for number in numbers {
            if tokens >= self.batch_tokens {
                batches.push(Vec::new());
                tokens = 0;
            }
            tokens += self.tokens_of(number);
            batches.last_mut().expect("one was begun").push(number);
        }
        batches.into_iter().map(|numbers| self.chosen(&numbers))
    }

    fn tokens_of(&self, number: usize) -> usize {
        match &self.inputs {
            Inputs::Tokens(sequences) => sequences[number].len(),
            Inputs::Images(_) => IMAGE_TOKENS,
        }
    }

    fn chosen(&self, numbers: &[usize]) -> Inputs {
        match &self.inputs {
            Inputs::Tokens(sequences) => {
                Inputs::Tokens(numbers.iter().map(|&number| sequences[number].clone()).collect())
            }
            Inputs::Images(images) => Inputs::Images(images.select(Axis(0), numbers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequences of one token each, their numbers.
    fn numbered(count: u32) -> Inputs {
        Inputs::Tokens((0..count).map(|number| vec![number]).collect())
    }

    fn tokens(inputs: Inputs) -> Vec<u32> {
        let Inputs::Tokens(sequences) = inputs else { panic!("tokens") };
        sequences.concat()
    }

    #[test]
    fn every_input_is_seen_once_a_round_and_the_last_eighth_never() {
        let mut batches = Batches::new(&numbered(32), false, 7, 1);
        let mut seen: Vec<u32> = (0..4).flat_map(|_| tokens(batches.next_batch())).collect();
        let second: Vec<u32> = (0..4).flat_map(|_| tokens(batches.next_batch())).collect();
        assert_ne!(seen, second, "in another order");
        seen.sort_unstable();
        assert_eq!(seen, (0..28).collect::<Vec<u32>>());
        assert_eq!(batches.held_out().flat_map(tokens).collect::<Vec<u32>>(), [28, 29, 30, 31]);
    }

    #[test]
    fn passing_over_batches_leaves_the_same_ones() {
        let (mut one, mut other) = (Batches::new(&numbered(20), false, 3, 5), Batches::new(&numbered(20), false, 3, 5));
        for _ in 0..9 {
            one.next_batch();
            other.skip();
        }
        assert_eq!(one.next_batch(), other.next_batch());
    }

    #[test]
    fn long_text_is_cut_and_a_single_input_is_both_trained_on_and_judged_by() {
        let long = Inputs::Tokens(vec![(0..300).collect()]);
        let cut = Batches::new(&long, true, 1024, 0);
        assert_eq!(cut.held_out().flat_map(tokens).collect::<Vec<u32>>(), (256..300).collect::<Vec<u32>>());
        let mut whole = Batches::new(&long, false, 1024, 0);
        assert_eq!(tokens(whole.next_batch()).len(), 300);
        assert_eq!(whole.held_out().flat_map(tokens).count(), 300);
    }
}
