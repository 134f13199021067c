//! `mcwc-pack`: a checkpoint in, an archive out, or one for each rate of a sweep; and on request a report of what that did
//! and what it is worth.

mod bar;
mod destination;
mod gates;
mod points;
mod print;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use self::gates::Gate;
use self::points::Outputs;
use super::bench::BenchError;
use super::{NOT_GOOD_ENOUGH, parse_threads};
use crate::pack::base::Base;
use crate::pack::calibration::{Calibration, CalibrationSource};
use crate::pack::encode::{Encoder, PackError};
use crate::pack::evaluation::Evaluation;
use crate::pack::keep::KeepRule;
use crate::pack::options::{
    AlignmentChoice, Assignment, BitAllocation, ColumnScales, Effort, EntropyModel, PackOptions, Permutations,
    PredictorChoice, Quantization, Steps, Target, TrellisStates,
};
use crate::pack::profile::Profile;
use crate::pack::report::{PackReport, TensorReport};
use crate::pack::source::Checkpoint;
use crate::pack::train::Training;

pub(super) use self::bar::{Bar, Phase};
pub(super) use self::destination::{Destination, copy_sidecars, io_at};
pub(super) use self::points::{Point, write_whole};
pub(super) use self::print::print;

/// Pack a checkpoint into a `.mcwc` archive.
#[derive(Args, Debug)]
pub struct PackArgs {
    /// A `.safetensors` file, or a Hugging Face directory.
    input: PathBuf,
    /// A `.mcwc` file, or a directory that receives the archive and every other file of the input.
    output: PathBuf,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    #[command(flatten)]
    judgement: JudgementArgs,
    /// What single tensors get instead: `PATTERN=lossless`, or `PATTERN=BITS` per element. PATTERN is a glob on tensor names
    /// (`*`, `?`, `[a-z]`, `{a,b}`); of several that match a tensor the last counts.
    #[arg(long, value_name = "PATTERN=lossless|BITS")]
    keep: Vec<KeepRule>,
    /// A model that this one was made from: an archive, a directory with one, or a checkpoint. Tensors are coded as what
    /// changed, where that is shorter. The result needs an archive of the base to be read: of exactly this base, for it is named
    /// by its content.
    #[arg(long, value_name = "BASE")]
    base: Option<PathBuf>,
    /// An earlier variant of the base that was packed losslessly: its archive, or a directory with one. Tensors that changed as
    /// they did there are coded as they were there, without a look at what else would do, so that packing takes less time. The
    /// others are decided as ever. The profile is not needed to read the result.
    #[arg(long, value_name = "VARIANT", requires = "base", conflicts_with_all = ["bpp", "max_rel_mse", "sweep"])]
    profile: Option<PathBuf>,
    /// How much time packing may take.
    #[arg(long, value_enum, default_value_t)]
    effort: Effort,
    /// Layers from one keyframe to the next: more predict more, fewer decode more in parallel.
    #[arg(long, value_name = "K", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    keyframe_interval: u32,
    /// How blocks of neighbouring layers are matched.
    #[arg(long, value_enum, default_value_t)]
    alignment: AlignmentChoice,
    /// How the assignment of blocks is solved.
    #[arg(long, value_enum, default_value_t)]
    assignment: Assignment,
    /// Seed of random permutations, and of which of equally similar blocks go together.
    #[arg(long, value_name = "SEED")]
    alignment_seed: Option<u64>,
    /// How permutations are written.
    #[arg(long, value_enum, default_value_t)]
    permutations: Permutations,
    /// Which predictors may be chosen.
    #[arg(long, value_enum, default_value_t)]
    predictor: PredictorChoice,
    /// Align and predict every record that may be, whether or not it pays: the paper's codec, for ablations.
    #[arg(long)]
    force_prediction: bool,
    /// Where quantizer steps are set.
    #[arg(long, value_enum, default_value_t)]
    steps: Steps,
    /// What bits are spent for, with calibration.
    #[arg(long, value_enum, default_value_t)]
    bit_allocation: BitAllocation,
    /// Which columns have steps of their own.
    #[arg(long, value_enum, default_value_t, help_heading = "Ablations")]
    column_scales: ColumnScales,
    /// How values become codes.
    #[arg(long, value_enum, default_value_t)]
    quantization: Quantization,
    /// What codes are coded with.
    #[arg(long, value_enum, default_value_t)]
    entropy_model: EntropyModel,
    /// States of the trellis, 8 to 256: more give less error at the same rate, and take longer to search but not to decode.
    /// The effort chooses where it is not given.
    #[arg(long, value_name = "STATES")]
    trellis_states: Option<TrellisStates>,
    /// Round to the nearest code, whatever it costs.
    #[arg(long)]
    no_rate_aware_rounding: bool,
    /// Embeddings and output heads get a step this many times finer.
    #[arg(long, value_name = "TIMES", default_value_t = 1.2, value_parser = refinement)]
    embedding_refinement: f32,
    /// Train the weights that are still to be quantized to make up for what those before them lost, by distillation on the
    /// calibration inputs: `auto` at up to 2.8 bits per parameter, and kept only where it helped on an eighth of the inputs that
    /// it did not see; `on` at any --bpp, and kept.
    #[arg(long, value_enum, default_value_t)]
    train: Training,
    /// Steps of training; as many as the effort allows where not given: none at `fast`, at most 400 at `default`, the paper's
    /// 20,000 (10,000 for images) at `max`.
    #[arg(long, value_name = "STEPS")]
    train_steps: Option<usize>,
    /// Seed of the order in which training sees its inputs.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// A directory that keeps the state of training. The same command goes on from it after it was stopped, to the same bytes.
    #[arg(long, value_name = "DIRECTORY")]
    train_state: Option<PathBuf>,
    /// Pack a checkpoint that was quantized before (GPTQ, AWQ, FP8 and others) with losses: what is quantized in it stays
    /// bit-exact, its other matrices lose.
    #[arg(long)]
    force_requantize: bool,
    /// Threads; all cores by default. The archive is the same for any number.
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Say what would be done to every tensor, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Measure what every stage saves, or would have cost, and print it. The archive is the same.
    #[arg(long)]
    stats: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Replace files that exist.
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct TargetArgs {
    /// Every decoded byte is the original's (the default).
    #[arg(long)]
    lossless: bool,
    /// Bits per parameter of the whole archive.
    #[arg(long, value_name = "R", value_parser = positive)]
    bpp: Option<f64>,
    /// Greatest squared error over squared weights, over all quantized tensors together.
    #[arg(long, value_name = "E", value_parser = below_one)]
    max_rel_mse: Option<f64>,
    /// One archive for each of these rates, in bits per parameter, and a table of rate and distortion. OUTPUT receives a
    /// directory for each, `4.2bpp` and so on, and the table as sweep.json.
    #[arg(long, value_name = "R,R,...", value_delimiter = ',', value_parser = positive)]
    sweep: Option<Vec<f64>>,
}

/// What the result is judged by, and where that is written.
#[derive(Args, Debug)]
struct JudgementArgs {
    /// Run the original and the decoded model on this data and compare what they say: text, token ids or pixels as for
    /// --calibration, with `labels` beside `pixel_values` where images have classes. Data that the model is calibrated on is
    /// refused.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    eval: Option<PathBuf>,
    /// Exit with 4 where this holds, for example 'kld>0.01': MEASURE>BOUND, >=, < or <=, where MEASURE is bpp, rel-mse, or,
    /// with --eval, kld, kld-median, kld-p99.9 (nats), ppl-ratio, top1, accuracy-drop or cosine-distance. The archive is
    /// written all the same. May be given several times; of a sweep one rate must pass them all.
    #[arg(long, value_name = "CONDITION", conflicts_with = "dry_run")]
    fail_if: Vec<Gate>,
    /// Write a report for people, one page that needs no network, and beside it the same as .json: where the bits went, what
    /// every stage saved, every tensor's rate and error, how alike layers are, decoding time and when packing pays. Implies
    /// --stats.
    #[arg(long, value_name = "FILE.html", conflicts_with = "dry_run", value_parser = page_name)]
    report: Option<PathBuf>,
    /// Write the section of a model card that is about the archive, in Markdown; `mcwcfs inspect --card` prints it, too.
    #[arg(long, value_name = "FILE.md", conflicts_with = "dry_run")]
    card: Option<PathBuf>,
}

fn page_name(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let is_page = path.extension().is_some_and(|extension| extension == "html");
    if is_page { Ok(path) } else { Err("expected a name that ends in .html".into()) }
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct CalibrationArgs {
    /// Run the model on these inputs and quantize so that its outputs, not its weights, stay near: text for the
    /// checkpoint's `tokenizer.json`, or a `.safetensors` file with `input_ids` (and `attention_mask`) or `pixel_values`, or
    /// a `.npy` array of either. A few thousand tokens of what the model is for will do; none of what it is judged by.
    #[arg(long, value_name = "FILE", conflicts_with = "lossless")]
    calibration: Option<PathBuf>,
    /// The same with a small text that comes with the program.
    #[arg(long, conflicts_with = "lossless")]
    calibrate: bool,
}

impl CalibrationArgs {
    fn source(&self) -> Option<CalibrationSource> {
        match &self.calibration {
            Some(path) => Some(CalibrationSource::File(path.clone())),
            None => self.calibrate.then_some(CalibrationSource::BuiltIn),
        }
    }
}

/// A tensor with more relative squared error than this is worth a warning.
const MUCH_ERROR: f64 = 0.3;

fn below_one(text: &str) -> Result<f64, String> {
    let value = positive(text)?;
    if value < 1.0 { Ok(value) } else { Err("expected less than 1, which is the error of all zeros".into()) }
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err("expected a positive number".into()) }
}

fn refinement(text: &str) -> Result<f32, String> {
    let value = positive(text)?;
    if (0.01..=100.0).contains(&value) { Ok(value as f32) } else { Err("expected 0.01 to 100".into()) }
}

/// Why the command failed.
#[derive(Debug, thiserror::Error)]
pub enum PackCommandError {
    /// Packing itself.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A sidecar, the output directory.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A rule that no tensor matches: it was meant for one.
    #[error("--keep {0}: no tensor of this checkpoint has such a name")]
    KeepsNothing(String),
    /// The output directory would become part of the input.
    #[error("{0}: lies inside the input, expected another directory or a .mcwc file")]
    InsideInput(PathBuf),
    /// The output would take the place of what it needs.
    #[error("{0}: is the base, which the variant cannot do without: expected another name")]
    OverBase(PathBuf),
    /// Codebooks are for whole weights.
    #[error("--quantization residual-vector: not for variants of a base, expected trellis, trellis-shared or scalar")]
    VectorsOfVariant,
    /// A file name for the output, where it would become a directory.
    #[error("{0}: named like a file, expected a .mcwc file or a directory")]
    OddName(PathBuf),
    /// A zoo without checkpoints.
    #[error("{0}: no .safetensors file in it or below, expected directories of checkpoints")]
    NoCheckpoints(PathBuf),
    /// Calibration that would change nothing.
    #[error(
        "--calibration changes nothing here: expected a rate (--bpp, --max-rel-mse or --keep), a trellis (not --quantization \
         scalar or residual-vector), and no --steps per-group"
    )]
    Uncalibrated,
    /// Calibration of a variant.
    #[error("--calibration with --base: a variant is quantized by the error of its weights; expected one of the two")]
    CalibratedVariant,
    /// Training without what it needs.
    #[error("--train on: expected --bpp, --calibration or --calibrate, and no --base")]
    Untrained,
    /// Similarity of activations without any.
    #[error(
        "--alignment activations and hybrid compare what blocks do on inputs: expected --calibration or --calibrate"
    )]
    NoActivations,
    /// Standard output does not take the result.
    #[error("standard output: {0}")]
    Print(std::io::Error),
    /// SIGINT and SIGTERM cannot be caught.
    #[error("signals: {0}")]
    Signals(std::io::Error),
    /// A condition on what nobody measures.
    #[error("--fail-if '{0}': needs data to judge the model by, expected --eval FILE")]
    NothingToJudgeBy(String),
    /// A file where a sweep needs a directory.
    #[error("{0}: named like a file, expected a directory for the archives of a sweep")]
    NoSweepDirectory(PathBuf),
    /// The same rate twice.
    #[error("--sweep: {0} twice, expected different rates")]
    SameRate(f64),
    /// Decoding could not be timed.
    #[error("decoding time: {0}")]
    Timing(#[from] BenchError),
    /// No thread pool.
    #[error("--threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Runs the command.
///
/// # Errors
/// See [`PackCommandError`]; what was on disk before is still there, unless `--force` replaced it.
pub fn run(args: &PackArgs) -> Result<ExitCode, PackCommandError> {
    // The global pool, because the final comparison decodes on threads of its own, which spread their work over that one.
    rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build_global()?;
    pack(args)
}

fn pack(args: &PackArgs) -> Result<ExitCode, PackCommandError> {
    let options = options(args)?;
    check_options(args, &options[0])?;
    let checkpoint = Checkpoint::open(&args.input).map_err(PackError::from)?;
    let names: Vec<&str> =
        checkpoint.files.iter().flat_map(|file| &file.header.tensors).map(|tensor| tensor.name.as_str()).collect();
    if let Some(rule) = args.keep.iter().find(|rule| !names.iter().any(|name| rule.matches(name))) {
        return Err(PackCommandError::KeepsNothing(rule.to_string()));
    }
    let outputs = Outputs::of(args, &checkpoint, &options)?;
    if !args.dry_run && !args.force {
        outputs.refuse_existing(&checkpoint)?;
    }
    let progress = Bar::new()?;
    let base = args.base.as_deref().map(Base::open).transpose().map_err(PackError::from)?;
    if let Some(base) = &base {
        check_base(base, &options[0], &outputs)?;
    }
    let profile = match (&args.profile, &base) {
        (Some(path), Some(base)) => Some(Profile::open(path, base).map_err(PackError::from)?),
        _ => None,
    };
    let mut encoder = Encoder::with_profile(&checkpoint, &options[0], base.as_ref(), profile.as_ref(), &progress)?;
    let calibration = match args.calibration.source() {
        Some(source) => Some(Calibration::load(&checkpoint, &source).map_err(PackError::from)?),
        None => None,
    };
    if let Some(path) = &args.judgement.eval {
        let evaluation = Evaluation::load(&checkpoint, path, calibration.as_ref()).map_err(PackError::from)?;
        encoder = encoder.with_evaluation(evaluation);
    }
    if let Some(calibration) = calibration {
        encoder = encoder.with_calibration(calibration).map_err(PackError::from)?;
    }
    if args.dry_run {
        return dry_run(args, &encoder, &progress);
    }
    let points = outputs.fill(args, &options, encoder, &checkpoint, &progress)?;
    progress.bar.finish_and_clear();
    for point in &points {
        if let Some(missed) = &point.report.target_missed {
            log::warn!("target missed: {missed}");
        }
        warn_of_damage(&point.report);
    }
    let chosen = points::choose(&points);
    outputs.describe(args, &checkpoint, base.as_ref(), &points, chosen)?;
    let copied = outputs.copies_sidecars().then_some(checkpoint.sidecars.len());
    print(|output| print::print_points(output, &points, copied, args))?;
    Ok(if points[chosen].passes() { ExitCode::SUCCESS } else { ExitCode::from(NOT_GOOD_ENOUGH) })
}

/// The options for each archive to be made.
fn options(args: &PackArgs) -> Result<Vec<PackOptions>, PackCommandError> {
    let targets = match (args.target.bpp, args.target.max_rel_mse, &args.target.sweep) {
        (Some(bits), ..) => vec![Target::BitsPerParameter(bits)],
        (_, Some(error), _) => vec![Target::RelativeSquaredError(error)],
        (.., Some(rates)) => {
            if let Some((_, &again)) = rates.iter().enumerate().find(|(number, rate)| rates[..*number].contains(rate)) {
                return Err(PackCommandError::SameRate(again));
            }
            rates.iter().map(|&rate| Target::BitsPerParameter(rate)).collect()
        }
        _ => vec![Target::Lossless],
    };
    let of = |target| PackOptions {
        target,
        effort: args.effort,
        keep: args.keep.clone(),
        keyframe_interval: args.keyframe_interval,
        alignment: args.alignment,
        assignment: args.assignment,
        alignment_seed: args.alignment_seed,
        permutations: args.permutations,
        predictor: args.predictor,
        force_prediction: args.force_prediction,
        steps: args.steps,
        bit_allocation: args.bit_allocation,
        column_scales: args.column_scales,
        quantization: args.quantization,
        entropy_model: args.entropy_model,
        trellis_states: args.trellis_states,
        rate_aware_rounding: !args.no_rate_aware_rounding,
        embedding_refinement: args.embedding_refinement,
        training: args.train,
        train_steps: args.train_steps,
        seed: args.seed,
        training_state: args.train_state.clone(),
        force_requantize: args.force_requantize,
        stats: args.stats || args.judgement.report.is_some(),
    };
    Ok(targets.into_iter().map(of).collect())
}

/// Refuses what would be asked for in vain.
fn check_options(args: &PackArgs, options: &PackOptions) -> Result<(), PackCommandError> {
    let has_trellis = matches!(options.quantization, Quantization::Trellis | Quantization::TrellisShared);
    let is_lossy = options.target.is_lossy() || !options.keep.is_empty();
    if args.calibration.source().is_some() && !(is_lossy && has_trellis && options.steps != Steps::PerGroup) {
        return Err(PackCommandError::Uncalibrated);
    }
    let is_calibrated = args.calibration.source().is_some();
    if is_calibrated && args.base.is_some() {
        return Err(PackCommandError::CalibratedVariant);
    }
    let has_rate = matches!(options.target, Target::BitsPerParameter(_));
    if options.training == Training::On && !(has_rate && is_calibrated && args.base.is_none()) {
        return Err(PackCommandError::Untrained);
    }
    if !is_calibrated && options.alignment.weight_of_weights().is_some() {
        return Err(PackCommandError::NoActivations);
    }
    let gate = args.judgement.fail_if.iter().find(|gate| gate.needs_evaluation());
    match gate.filter(|_| args.judgement.eval.is_none()) {
        Some(gate) => Err(PackCommandError::NothingToJudgeBy(gate.to_string())),
        None => Ok(()),
    }
}

fn check_base(base: &Base, options: &PackOptions, outputs: &Outputs) -> Result<(), PackCommandError> {
    if options.quantization == Quantization::ResidualVector {
        return Err(PackCommandError::VectorsOfVariant);
    }
    let real = |path: &Path| path.canonicalize().ok();
    let base_path = real(base.archive().path());
    let over = outputs.archives().find(|archive| base_path.is_some() && real(archive) == base_path);
    if let Some(archive) = over {
        return Err(PackCommandError::OverBase(archive.to_owned()));
    }
    if !base.is_packed() {
        log::warn!(
            "{}: is a checkpoint; the variant can be read once there is a lossless archive of it, too",
            base.archive().path().display()
        );
    }
    Ok(())
}

/// Prints the plan; of a sweep that of its first rate.
fn dry_run(args: &PackArgs, encoder: &Encoder<'_>, progress: &Bar) -> Result<ExitCode, PackCommandError> {
    let plan = encoder.dry_run()?;
    progress.bar.finish_and_clear();
    print(|output| print::print_plan(output, &plan, args.json))?;
    Ok(ExitCode::SUCCESS)
}

/// One bound holds for all tensors together; a single one may still be worse than its model can bear.
fn warn_of_damage(report: &PackReport) {
    let error = |tensor: &TensorReport| tensor.relative_squared_error.unwrap_or(0.0);
    let damaged: Vec<&TensorReport> = report.tensors.iter().filter(|tensor| error(tensor) > MUCH_ERROR).collect();
    let worst = damaged.iter().copied().max_by(|a, b| error(a).total_cmp(&error(b)));
    if let Some(worst) = worst {
        log::warn!(
            "{} tensors have a relative squared error above {MUCH_ERROR}, {} of {:.2}: a higher rate or --keep helps",
            damaged.len(),
            worst.name,
            error(worst)
        );
    }
}
