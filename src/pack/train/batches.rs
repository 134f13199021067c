//! Calibration inputs in batches: most to train on, in an order that a seed decides, and the last of them held out.

use ndarray::Axis;

use crate::forward::inputs::Inputs;
use crate::forward::model::Transformer;

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
    /// Batches of about so many tokens.
    pub fn new(inputs: &Inputs, model: &Transformer, batch_tokens: usize, seed: u64) -> Self {
        let inputs = match inputs {
            Inputs::Tokens(sequences) if model.is_causal() => {
                Inputs::Tokens(sequences.iter().flat_map(|sequence| sequence.chunks(PIECE_TOKENS)).map(<[u32]>::to_vec).collect())
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
            Inputs::Tokens(sequences) => Inputs::Tokens(numbers.iter().map(|&number| sequences[number].clone()).collect()),
            Inputs::Images(images) => Inputs::Images(images.select(Axis(0), numbers)),
        }
    }
}
