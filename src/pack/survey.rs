//! A look at the whole checkpoint before it is encoded: what every part would cost at a step, measured on a sample that stays
//! in memory, so that trying a step reads no file.
//!
//! Runs of one part differ in scale more than in shape, so the sample is stratified: of the runs of each half octave of energy
//! it has some, and each counts for the runs it stands for.

mod sample;

use rayon::prelude::*;

pub use self::sample::Sample;
use super::counting::{PlacedCounts, count, count_placed, count_weighted, mean_raw_bits};
use super::difference::CountedDifferences;
use super::entropy_model::{ClassHistograms, TablePool};
use super::lossless::Split;
use super::options::{PackOptions, Quantization};
use super::quantize::{LARGEST_CODE, PartQuantizer};
use super::rate::{StepSearch, gaussian_step};
use super::symbols::RunLayout;
use super::treatment::{BasedChoice, Decision, ExactStart, Fineness, Start, Treatment, changes};
use crate::tensor::{Dtype, TensorInfo};

/// Bit-exact symbols counted per part; larger parts are sampled by whole runs.
const COUNTED_ELEMENTS: usize = 1 << 22;
/// Above this rate a quantized part is compared with the same part bit-exact, which takes 10.6 bits where the weights are
/// bfloat16.
const DOUBTFUL_BITS: f64 = 8.0;
/// Bits of a strip beside its symbols: lane states, checksum, lengths.
const STRIP_BITS: f64 = 8.0 * 138.0;
/// Bits that the choice of a run's table takes, about.
const RUN_BITS: f64 = 1.5;
/// Bits of a part's header and its place in the index, about.
const PART_BITS: f64 = 8.0 * 48.0;

/// Coarsest step of any part in root mean squares of its own weights, or twice what the checkpoint's step is in those of all
/// weights. One step for all gives the least error in sum, but weights that are much smaller than the rest would all become 0.
const LEAST_COARSEST: f64 = 0.8;

/// What is known of every part, record by record.
pub struct Survey<'a> {
    options: &'a PackOptions,
    /// Tables of an earlier variant, where parts are coded as it was.
    known: TablePool,
    parts: Vec<Vec<SurveyedPart<'a>>>,
}

#[derive(Clone)]
struct SurveyedPart<'a> {
    tensor: &'a TensorInfo,
    bytes: &'a [u8],
    layout: RunLayout,
    /// Number of the part, over all records.
    number: u32,
    state: State,
    /// The part as it may be instead: bit-exact from a base, as long as it is to be quantized; quantized, once it is not.
    instead: Option<State>,
}

#[derive(Clone)]
enum State {
    Raw,
    Split {
        split: Split,
        counted: ClassHistograms,
        /// Raw bits of all symbols.
        raw_bits: f64,
    },
    Based {
        choice: BasedChoice,
        counted: ClassHistograms,
        /// Raw bits of all symbols.
        raw_bits: f64,
        /// Bits of a product.
        side_bits: f64,
        strips: usize,
    },
    Quantized {
        sample: Sample,
        fineness: Fineness,
        own: Option<OwnStep>,
        /// Bits of the part were it bit-exact; counted when first asked for.
        exact_bits: Option<f64>,
    },
}

/// The step of a part that has a rate of its own.
#[derive(Clone)]
struct OwnStep {
    step: f64,
    search: StepSearch,
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The step.
    pub step: f64,
    /// Tables fitted to what was placed.
    pub pool: TablePool,
    /// Record by record.
    pub parts: Vec<Vec<ProbedPart>>,
}

/// What a part would be.
#[derive(Clone, Copy, Debug)]
pub struct ProbedPart {
    /// How it would be coded.
    pub decision: Decision,
    /// Whether the checkpoint's step is its step too.
    pub follows_step: bool,
    /// Elements.
    pub elements: u64,
    /// Bits, headers included.
    pub bits: f64,
    /// Squared error, in squared weight units.
    pub squared_error: f64,
}

/// The sample of a part that is to be quantized.
#[derive(Clone, Copy)]
pub struct PartSample<'s> {
    /// Number of the record and of the part in it.
    pub place: (usize, usize),
    /// Layout of the whole part.
    pub layout: RunLayout,
    /// Some of its runs.
    pub sample: &'s Sample,
    /// How finely it is to be quantized.
    pub fineness: Fineness,
}

/// Whether a probe may decide for good that a part is bit-exact, or move the step of one that has its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settling {
    Settle,
    Leave,
}

/// A part on its way through a probe.
struct Tried {
    quantizer: PartQuantizer,
    counts: PlacedCounts,
}

impl<'a> Survey<'a> {
    /// Starts with no part known; `parts` are added with [`Survey::add`], record after record.
    pub fn new(options: &'a PackOptions) -> Self {
        Self { options, known: TablePool::default(), parts: Vec::new() }
    }

    /// The same samples for other options, as if they had just been taken.
    #[must_use]
    pub fn with_options(&self, options: &'a PackOptions) -> Self {
        Self { options, known: self.known.clone(), parts: self.parts.clone() }
    }

    /// The same where parts are coded with these tables, under these numbers.
    #[must_use]
    pub fn with_tables(self, known: TablePool) -> Self {
        Self { known, ..self }
    }

    /// Begins a record.
    pub fn begin_record(&mut self) {
        self.parts.push(Vec::new());
    }

    /// Looks at a part of the record begun last. `share` is the part of its weights that is to be sampled, `start` what it
    /// starts from where it is quantized from a base, `exact` how it starts from there bit-exact, or may.
    pub fn add(
        &mut self,
        treatment: Treatment,
        (tensor, bytes): (&'a TensorInfo, &'a [u8]),
        start: Option<&Start>,
        exact: Option<&ExactStart>,
        share: f64,
    ) {
        let layout = RunLayout::of_shape(&tensor.shape, self.options.steps.group());
        let state = match treatment {
            Treatment::Quantized(fineness) => State::Quantized {
                sample: match start {
                    Some(start) => {
                        let values = changes(tensor, bytes, &start.predicted);
                        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                        Sample::take(&TensorInfo { dtype: Dtype::F32, ..tensor.clone() }, &bytes, layout, share)
                    }
                    None => Sample::take(tensor, bytes, layout, share),
                },
                fineness,
                own: None,
                exact_bits: None,
            },
            Treatment::Split(split) => State::split(split, tensor, bytes),
            Treatment::Raw => State::Raw,
            Treatment::Based(_) => State::based(exact.expect("chosen by what is known of it")),
        };
        let instead = exact.filter(|_| matches!(treatment, Treatment::Quantized(_))).map(State::based);
        let number = self.parts.iter().map(Vec::len).sum::<usize>() as u32;
        self.parts.last_mut().expect("a record was begun").push(SurveyedPart {
            tensor,
            bytes,
            layout,
            number,
            state,
            instead,
        });
    }

    /// Elements that follow the checkpoint's step, and the sum of their squares.
    pub fn energy(&self) -> (u64, f64) {
        let following = self.parts.iter().flatten().filter_map(|part| match &part.state {
            State::Quantized { sample, fineness: Fineness::Times(_), .. } => {
                Some((part.layout.elements as u64, sample.energy))
            }
            _ => None,
        });
        following.fold((0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
    }

    /// Sum of squares of everything that is quantized, parts with a rate of their own included.
    pub fn quantized_energy(&self) -> f64 {
        let quantized = self.parts.iter().flatten().filter_map(|part| match &part.state {
            State::Quantized { sample, .. } => Some(sample.energy),
            _ => None,
        });
        quantized.sum()
    }

    /// Whether any part has a rate of its own.
    pub fn has_rates(&self) -> bool {
        self.parts
            .iter()
            .flatten()
            .any(|part| matches!(part.state, State::Quantized { fineness: Fineness::Rate(_), .. }))
    }

    /// Tries a step. `before` is the last probe, whose tables are a good first guess. Parts that are no longer as bit-exact
    /// ones are that from then on.
    pub fn probe(&mut self, step: f64, before: Option<&Probe>) -> Probe {
        self.probe_as(self.options, step, before, Settling::Settle)
    }

    /// Takes back that parts are bit-exact because that was no longer; whether there were any.
    pub fn reconsider(&mut self) -> bool {
        let mut was_any = false;
        for part in self.parts.iter_mut().flatten() {
            if let Some(instead) = &mut part.instead
                && matches!(instead, State::Quantized { .. })
            {
                std::mem::swap(&mut part.state, instead);
                was_any = true;
            }
        }
        was_any
    }

    /// What bit-exact parts take, where the others are to be of vectors; nothing is said of those.
    pub fn probe_exact(&mut self) -> Probe {
        let mut probe = self.probe_as(self.options, 1.0, None, Settling::Leave);
        for sample in self.samples() {
            probe.parts[sample.place.0][sample.place.1].bits = 0.0;
        }
        probe
    }

    /// The samples of all parts that are to be quantized.
    pub fn samples(&self) -> impl Iterator<Item = PartSample<'_>> {
        let parts = self.parts.iter().enumerate().flat_map(|(record, parts)| {
            parts.iter().enumerate().map(move |(part, surveyed)| ((record, part), surveyed))
        });
        parts.filter_map(|(place, part)| match &part.state {
            State::Quantized { sample, fineness, .. } => {
                Some(PartSample { place, layout: part.layout, sample, fineness: *fineness })
            }
            _ => None,
        })
    }

    /// Bits and squared error of everything quantized, were it packed with other options. Nothing is settled by that.
    pub fn try_options(&mut self, options: &PackOptions, step: f64) -> (f64, f64) {
        let probe = self.probe_as(options, step, None, Settling::Leave);
        let quantized = probe.parts.iter().flatten().filter(|part| part.decision.is_quantized());
        quantized.fold((0.0, 0.0), |sum, part| (sum.0 + part.bits, sum.1 + part.squared_error))
    }

    fn probe_as(&mut self, options: &PackOptions, step: f64, before: Option<&Probe>, settling: Settling) -> Probe {
        let empty = TablePool::default();
        let known = before.map_or(&empty, |probe| &probe.pool);
        let (following, energy) = self.energy();
        let rms = (energy / following.max(1) as f64).sqrt();
        let mut parts: Vec<&mut SurveyedPart<'a>> = self.parts.iter_mut().flatten().collect();
        let quantizers: Vec<Option<PartQuantizer>> =
            parts.par_iter_mut().map(|part| part.quantizer(step, rms, options)).collect();
        let first = first_tables(&parts, &quantizers, known);
        let tried: Vec<Option<Tried>> = parts
            .par_iter_mut()
            .zip(quantizers)
            .map(|(part, quantizer)| part.try_quantizer(quantizer?, &first, settling))
            .collect();
        // In order, so that sums do not depend on the number of threads.
        let mut classes = ClassHistograms::default();
        for (part, tried) in parts.iter_mut().zip(&tried) {
            match (&part.state, tried) {
                (State::Quantized { .. }, Some(tried)) => classes.merge(&tried.counts.classes),
                (State::Quantized { .. }, None) if settling == Settling::Settle => {
                    let exact = part.instead.take().unwrap_or_else(|| State::exact(part.tensor, part.bytes));
                    part.instead = Some(std::mem::replace(&mut part.state, exact));
                }
                _ => (),
            }
            if let State::Split { counted, .. } | State::Based { counted, .. } = &part.state {
                classes.merge(counted);
            }
        }
        let pool = self.known.followed_by(classes.fit());
        let probed: Vec<ProbedPart> = (parts.par_iter_mut().zip(&tried))
            .map(|(part, tried)| part.probed(tried.as_ref(), &pool, settling))
            .collect();
        drop(parts);
        let mut probed = probed.into_iter();
        let parts = self.parts.iter().map(|record| probed.by_ref().take(record.len()).collect()).collect();
        Probe { step, pool, parts }
    }
}

/// Tables to place the symbols with: those known, or where one of a kind is missing, all fitted to the nearest symbols.
fn first_tables(parts: &[&mut SurveyedPart<'_>], quantizers: &[Option<PartQuantizer>], known: &TablePool) -> TablePool {
    let missing = |quantizer: &Option<PartQuantizer>| {
        quantizer
            .as_ref()
            .is_some_and(|quantizer| !known.has(quantizer.choice.rounding.kind(quantizer.choice.raw_bits)))
    };
    if !quantizers.iter().any(missing) {
        return known.clone();
    }
    let counted: Vec<Option<ClassHistograms>> = (parts.par_iter().zip(quantizers))
        .map(|(part, quantizer)| {
            let (State::Quantized { sample, .. }, Some(quantizer)) = (&part.state, quantizer) else { return None };
            Some(sample.with_symbols(quantizer, |symbols| count_weighted(symbols, 1, &|run| sample.weights[run])))
        })
        .collect();
    let mut classes = ClassHistograms::default();
    for counted in counted.iter().flatten() {
        classes.merge(counted);
    }
    classes.fit()
}

impl State {
    fn split(split: Split, tensor: &TensorInfo, bytes: &[u8]) -> Self {
        let symbols = split.symbols(tensor, bytes);
        let every = (symbols.layout().elements / COUNTED_ELEMENTS).max(1);
        let counted =
            if every == 1 { count(&*symbols, 1) } else { count_weighted(&*symbols, every, &|_| every as u64) };
        Self::Split { split, raw_bits: mean_raw_bits(&*symbols) * symbols.layout().elements as f64, counted }
    }

    fn based(exact: &ExactStart) -> Self {
        let CountedDifferences { classes, raw_bits, strips } = exact.counted.clone();
        let raw_bits = exact.bytes_as_known.map_or(raw_bits, |bytes| 8.0 * bytes);
        let side_bits = exact.product.as_ref().map_or(0.0, |found| found.stored.bits());
        Self::Based { choice: exact.choice, counted: classes, raw_bits, side_bits, strips }
    }

    /// Bit-exact, as short as it gets.
    fn exact(tensor: &TensorInfo, bytes: &[u8]) -> Self {
        match Treatment::exact(tensor, bytes) {
            Treatment::Split(split) => Self::split(split, tensor, bytes),
            _ => Self::Raw,
        }
    }

    /// Bits of a bit-exact part with tables of its own.
    fn body_bits(&self, bytes: &[u8]) -> f64 {
        match self {
            Self::Split { counted, raw_bits, .. } => counted.bits(&counted.fit()) + raw_bits,
            Self::Based { counted, raw_bits, side_bits, .. } => counted.bits(&counted.fit()) + raw_bits + side_bits,
            _ => 8.0 * bytes.len() as f64,
        }
    }
}

impl SurveyedPart<'_> {
    /// The scalar or trellis quantizer of a part that is to be quantized, unless it cannot be.
    fn quantizer(&mut self, step: f64, rms_of_all: f64, options: &PackOptions) -> Option<PartQuantizer> {
        let State::Quantized { sample, fineness, own, .. } = &mut self.state else { return None };
        if options.quantization == Quantization::ResidualVector {
            return None;
        }
        let step = match *fineness {
            Fineness::Times(times) => {
                let most = (2.0 * step / rms_of_all).max(LEAST_COARSEST) * sample.root_mean_square;
                (step / f64::from(times)).min(most)
            }
            Fineness::Rate(bits) => {
                let elements = self.layout.elements as f64;
                let first = || OwnStep {
                    step: gaussian_step(sample.root_mean_square, bits),
                    search: StepSearch::new(bits * elements, -elements),
                };
                own.get_or_insert_with(first).step
            }
        };
        let (layout, rms, own_table) = (sample.layout, sample.root_mean_square, options.own_table(self.number));
        let quantizer = PartQuantizer::choose(&sample.values, layout, step as f32, rms, own_table, options)?;
        // With room for a step that is corrected later.
        (1.5 * sample.largest / quantizer.least_step() < LARGEST_CODE).then_some(quantizer)
    }

    /// Places the sample. `None` where the part is shorter bit-exact.
    fn try_quantizer(&mut self, quantizer: PartQuantizer, first: &TablePool, settling: Settling) -> Option<Tried> {
        let State::Quantized { sample, exact_bits, .. } = &mut self.state else { return None };
        let counts =
            sample.with_symbols(&quantizer, |symbols| count_placed(symbols, first, &|run| sample.weights[run]))?;
        let bits = (counts.classes.bits(first) + counts.other_bits) / counts.symbols.max(1) as f64;
        if (bits > DOUBTFUL_BITS || self.instead.is_some()) && settling == Settling::Settle {
            let elements = self.layout.elements as f64;
            let (tensor, bytes) = (self.tensor, self.bytes);
            let based = self.instead.as_ref();
            let exact = exact_bits.get_or_insert_with(|| match based {
                Some(exact) => exact.body_bits(bytes),
                None => State::exact(tensor, bytes).body_bits(bytes),
            });
            if *exact <= bits * elements {
                return None;
            }
        }
        Some(Tried { quantizer, counts })
    }

    fn probed(&mut self, tried: Option<&Tried>, pool: &TablePool, settling: Settling) -> ProbedPart {
        let elements = self.layout.elements as u64;
        let raw_bits = 8.0 * self.bytes.len() as f64;
        let overhead = PART_BITS + RUN_BITS * self.layout.runs() as f64 + STRIP_BITS * self.layout.strips() as f64;
        let exact = |decision, bits| ProbedPart { decision, follows_step: false, elements, bits, squared_error: 0.0 };
        match (&mut self.state, tried) {
            (State::Quantized { fineness, own, .. }, Some(tried)) => {
                let scale = elements as f64 / tried.counts.symbols.max(1) as f64;
                let bits = scale * (tried.counts.classes.bits(pool) + tried.counts.other_bits) + overhead;
                if let (Some(own), Fineness::Rate(_), Settling::Settle) = (own, *fineness, settling) {
                    own.step = own.search.next(own.step, bits);
                }
                let unit = f64::from(tried.quantizer.choice.step).powi(2) * tried.quantizer.mean_column_square();
                let squared_error = scale * (tried.counts.squared_error - unit * tried.counts.classes.centroid_gain());
                let decision = Decision::Quantized(tried.quantizer.choice);
                let follows_step = matches!(fineness, Fineness::Times(_));
                ProbedPart { decision, follows_step, elements, bits, squared_error }
            }
            (State::Split { split, counted, raw_bits: of_symbols }, _) => {
                let bits = counted.bits(pool) + *of_symbols + overhead;
                exact(Decision::Split(*split), bits.min(raw_bits + PART_BITS))
            }
            (State::Based { choice, counted, raw_bits, side_bits, strips }, _) => {
                let bits = counted.bits(pool) + *raw_bits + *side_bits + PART_BITS + STRIP_BITS * *strips as f64;
                exact(Decision::Based(*choice), bits)
            }
            _ => exact(Decision::Raw, raw_bits + PART_BITS),
        }
    }
}
