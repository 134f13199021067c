//! Where decoding spends its time, stage by stage (the paper's Table 9): for `mcwcfs bench`, nobody else asks.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// A stage of decoding. The fast engine dequantizes by look-up while it decodes entropy, so those two are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// CRC-32C of the stored bytes.
    Checksum,
    /// What each table position turns into: step, mean, rounding.
    ValueTables,
    /// Symbols decoded and looked up, the trellis followed.
    Entropy,
    /// Raw bits joined to symbols.
    RawBits,
    /// Reference blocks gathered from where they were permuted to.
    Placement,
    /// Prediction added, result rounded.
    Prediction,
    /// Exceptions patched.
    Exceptions,
}

impl Stage {
    /// All of them, in the order of decoding.
    pub const ALL: [Self; 7] = [
        Self::Checksum,
        Self::ValueTables,
        Self::Entropy,
        Self::RawBits,
        Self::Placement,
        Self::Prediction,
        Self::Exceptions,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::ValueTables => "value tables",
            Self::Entropy => "entropy decoding and dequantization",
            Self::RawBits => "raw bits",
            Self::Placement => "inverse placement",
            Self::Prediction => "prediction and rounding",
            Self::Exceptions => "exceptions",
        }
    }
}

/// Adds up the time of each stage. Reading the clock for every run of 2000 symbols costs a few percent.
#[derive(Debug)]
pub struct StageClock {
    last: Cell<Instant>,
    spent: [Cell<Duration>; Stage::ALL.len()],
}

impl Default for StageClock {
    fn default() -> Self {
        Self { last: Cell::new(Instant::now()), spent: Default::default() }
    }
}

impl StageClock {
    /// What happens from now on belongs to the next stage that ends.
    pub fn start(&self) {
        self.last.set(Instant::now());
    }

    /// What happened since the last stage ended was this stage.
    pub fn end(&self, stage: Stage) {
        let now = Instant::now();
        let spent = &self.spent[stage as usize];
        spent.set(spent.get() + (now - self.last.replace(now)));
    }

    /// Time of a stage so far.
    pub fn spent(&self, stage: Stage) -> Duration {
        self.spent[stage as usize].get()
    }
}
