//! `mcwc-pack`: a checkpoint in, an archive out.

use std::io::{IsTerminal, StdoutLock, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag::{register, register_conditional_shutdown};

use super::{lies_inside, parse_threads};
use crate::pack::base::Base;
use crate::pack::calibration::{Calibration, CalibrationSource};
use crate::pack::encode::{Encoder, PackError, Progress, hidden_file};
use crate::pack::keep::KeepRule;
use crate::pack::options::{
    AlignmentChoice, ColumnScales, Effort, EntropyModel, PackOptions, PredictorChoice, Quantization, Steps, Target,
    TrellisStates,
};
use crate::pack::report::{PackReport, TensorReport};
use crate::pack::source::{Checkpoint, Sidecar};

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
    /// What single tensors get instead: `PATTERN=lossless`, or `PATTERN=BITS` per element. PATTERN is a glob on tensor names
    /// (`*`, `?`, `[a-z]`, `{a,b}`); of several that match a tensor the last counts.
    #[arg(long, value_name = "PATTERN=lossless|BITS")]
    keep: Vec<KeepRule>,
    /// A model that this one was made from: an archive, a directory with one, or a checkpoint. Tensors are coded as what
    /// changed, where that is shorter. The result needs an archive of the base to be read: of exactly this base, for it is named
    /// by its content.
    #[arg(long, value_name = "BASE")]
    base: Option<PathBuf>,
    /// How much time packing may take.
    #[arg(long, value_enum, default_value_t)]
    effort: Effort,
    /// Layers from one keyframe to the next: more predict more, fewer decode more in parallel.
    #[arg(long, value_name = "K", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    keyframe_interval: u32,
    /// How blocks of neighbouring layers are matched.
    #[arg(long, value_enum, default_value_t)]
    alignment: AlignmentChoice,
    /// Which predictors may be chosen.
    #[arg(long, value_enum, default_value_t)]
    predictor: PredictorChoice,
    /// Where quantizer steps are set.
    #[arg(long, value_enum, default_value_t)]
    steps: Steps,
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
    /// Standard output does not take the result.
    #[error("standard output: {0}")]
    Print(std::io::Error),
    /// SIGINT and SIGTERM cannot be caught.
    #[error("signals: {0}")]
    Signals(std::io::Error),
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
    let target = match (args.target.bpp, args.target.max_rel_mse) {
        (Some(bits), _) => Target::BitsPerParameter(bits),
        (_, Some(error)) => Target::RelativeSquaredError(error),
        _ => Target::Lossless,
    };
    let options = PackOptions {
        target,
        effort: args.effort,
        keep: args.keep.clone(),
        keyframe_interval: args.keyframe_interval,
        alignment: args.alignment,
        predictor: args.predictor,
        steps: args.steps,
        column_scales: args.column_scales,
        quantization: args.quantization,
        entropy_model: args.entropy_model,
        trellis_states: args.trellis_states,
        rate_aware_rounding: !args.no_rate_aware_rounding,
        embedding_refinement: args.embedding_refinement,
        force_requantize: args.force_requantize,
        stats: args.stats,
    };
    let calibration = args.calibration.source();
    let has_trellis = matches!(options.quantization, Quantization::Trellis | Quantization::TrellisShared);
    let is_lossy = options.target.is_lossy() || !options.keep.is_empty();
    if calibration.is_some() && !(is_lossy && has_trellis && options.steps != Steps::PerGroup) {
        return Err(PackCommandError::Uncalibrated);
    }
    let checkpoint = Checkpoint::open(&args.input).map_err(PackError::from)?;
    let names: Vec<&str> =
        checkpoint.files.iter().flat_map(|file| &file.header.tensors).map(|tensor| tensor.name.as_str()).collect();
    if let Some(rule) = options.keep.iter().find(|rule| !names.iter().any(|name| rule.matches(name))) {
        return Err(PackCommandError::KeepsNothing(rule.to_string()));
    }
    let destination = Destination::of(&args.output, &checkpoint)?;
    if !args.dry_run && !args.force {
        destination.refuse_existing(&checkpoint.sidecars)?;
    }
    let progress = Bar::new()?;
    let base = args.base.as_deref().map(Base::open).transpose().map_err(PackError::from)?;
    if let Some(base) = &base {
        if options.quantization == Quantization::ResidualVector {
            return Err(PackCommandError::VectorsOfVariant);
        }
        let real = |path: &Path| path.canonicalize().ok();
        if real(base.archive().path()).is_some_and(|base| real(&destination.archive) == Some(base)) {
            return Err(PackCommandError::OverBase(destination.archive));
        }
    }
    let mut encoder = Encoder::with_base(&checkpoint, &options, base.as_ref(), &progress)?;
    if let Some(source) = calibration {
        encoder = encoder.with_calibration(Calibration::load(&checkpoint, &source).map_err(PackError::from)?);
    }
    if args.dry_run {
        let plan = encoder.dry_run()?;
        progress.bar.finish_and_clear();
        print(|output| print_plan(output, &plan, args.json))?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = destination.fill(&encoder, &checkpoint.sidecars, args.force)?;
    progress.bar.finish_and_clear();
    let copied = destination.directory.is_some().then_some(checkpoint.sidecars.len());
    print(|output| print_report(output, &report, copied, args.json))?;
    if let Some(missed) = &report.target_missed {
        log::warn!("target missed: {missed}");
    }
    warn_of_damage(&report);
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

/// Where the output goes.
pub(super) struct Destination {
    pub(super) archive: PathBuf,
    /// Receives sidecars; absent where a file was named.
    directory: Option<PathBuf>,
}

impl Destination {
    pub(super) fn of(output: &Path, checkpoint: &Checkpoint) -> Result<Self, PackCommandError> {
        let names_archive = output.extension().is_some_and(|extension| extension == "mcwc");
        if names_archive && !output.is_dir() {
            if !checkpoint.sidecars.is_empty() {
                log::info!("{} sidecars are not packed: name a directory to copy them", checkpoint.sidecars.len());
            }
            return Ok(Self { archive: output.to_owned(), directory: None });
        }
        if output.is_file()
            || output.extension().is_some_and(|extension| extension == "safetensors") && !output.is_dir()
        {
            return Err(PackCommandError::OddName(output.to_owned()));
        }
        let is_inside = |input: PathBuf| input.is_dir() && lies_inside(output, &input);
        if checkpoint.path.canonicalize().is_ok_and(is_inside) {
            return Err(PackCommandError::InsideInput(output.to_owned()));
        }
        let stem = match checkpoint.files.as_slice() {
            [file] => file.name.strip_suffix(".safetensors").unwrap_or("model"),
            _ => "model",
        };
        Ok(Self { archive: output.join(format!("{stem}.mcwc")), directory: Some(output.to_owned()) })
    }

    fn refuse_existing(&self, sidecars: &[Sidecar]) -> Result<(), PackCommandError> {
        let copies = self.directory.iter().flat_map(|directory| sidecars.iter().map(|file| directory.join(&file.name)));
        match std::iter::once(self.archive.clone()).chain(copies).find(|path| path.symlink_metadata().is_ok()) {
            Some(path) => Err(PackError::Exists(path).into()),
            None => Ok(()),
        }
    }

    /// Packs, copies the sidecars, and gives the archive its name last: what fails before leaves nothing behind.
    pub(super) fn fill(
        &self,
        encoder: &Encoder<'_>,
        sidecars: &[Sidecar],
        force: bool,
    ) -> Result<PackReport, PackCommandError> {
        let Some(directory) = &self.directory else {
            return Ok(encoder.pack(&self.archive, force)?);
        };
        let is_new = !directory.exists();
        std::fs::create_dir_all(directory).map_err(io_at(directory))?;
        let packed = encoder.write(&self.archive).map_err(PackCommandError::from).and_then(|finished| {
            copy_sidecars(sidecars, directory)?;
            Ok(finished.publish(force)?)
        });
        if packed.is_err() && is_new {
            let _ = std::fs::remove_dir(directory); // only if it is empty, and the error at hand says more
        }
        packed
    }
}

pub(super) fn io_at(path: &Path) -> impl FnOnce(std::io::Error) -> PackCommandError {
    let path = path.to_owned();
    move |source| PackCommandError::Io { path, source }
}

/// Copies sidecars under temporary names; they get their own once all are there.
fn copy_sidecars(sidecars: &[Sidecar], directory: &Path) -> Result<(), PackCommandError> {
    let mut copies = Vec::with_capacity(sidecars.len());
    for sidecar in sidecars {
        let target = directory.join(&sidecar.name);
        let parent = target.parent().unwrap_or(directory);
        std::fs::create_dir_all(parent).map_err(io_at(parent))?;
        let temporary = hidden_file(parent, "").map_err(io_at(&target))?;
        let temporary = temporary.into_temp_path(); // closed: there may be more of them than descriptors
        std::fs::copy(&sidecar.path, &temporary).map_err(io_at(&sidecar.path))?;
        copies.push((temporary, target));
    }
    for (temporary, target) in copies {
        temporary.persist(&target).map_err(|error| io_at(&target)(error.error))?;
    }
    Ok(())
}

/// A bar on a terminal, nothing elsewhere; and what SIGINT and SIGTERM ask for.
pub(super) struct Bar {
    pub(super) bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl Bar {
    /// From here on, the first signal stops the work in an orderly way, and a second one at once.
    pub(super) fn new() -> Result<Self, PackCommandError> {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = "{msg:10} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let bar = ProgressBar::with_draw_target(Some(0), target);
        bar.set_style(ProgressStyle::with_template(style).expect("the template is right").progress_chars("=> "));
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the flag is not yet set when the first signal comes to the first of the two.
            register_conditional_shutdown(signal, 128 + signal, Arc::clone(&interrupted))
                .and_then(|_| register(signal, Arc::clone(&interrupted)))
                .map_err(PackCommandError::Signals)?;
        }
        Ok(Self { bar, interrupted })
    }
}

impl Progress for Bar {
    fn phase(&self, name: &str, bytes: u64) {
        self.bar.reset();
        self.bar.set_length(bytes);
        self.bar.set_message(name.to_owned());
        log::debug!("phase: {name}");
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

/// Writes to standard output; a reader that went away is an error, not a panic.
pub(super) fn print(write: impl FnOnce(&mut StdoutLock<'_>) -> std::io::Result<()>) -> Result<(), PackCommandError> {
    let mut output = std::io::stdout().lock();
    write(&mut output).and_then(|()| output.flush()).map_err(PackCommandError::Print)
}

fn print_plan(output: &mut impl Write, plan: &[TensorReport], json: bool) -> std::io::Result<()> {
    if json {
        return writeln!(output, "{}", serde_json::to_string_pretty(plan).expect("plain data"));
    }
    writeln!(output, "{:>10}  {:<10} {:<10} {:<6} tensor", "bits/elem", "treatment", "record", "dtype")?;
    for tensor in plan {
        let kept = tensor.keep.as_ref().map_or(String::new(), |keep| format!(" (--keep {keep})"));
        writeln!(
            output,
            "{:>10.3}  {:<10} {:<10} {:<6} {} {:?}{kept}",
            tensor.bits_per_element, tensor.treatment, tensor.block_type, tensor.dtype, tensor.name, tensor.shape
        )?;
    }
    Ok(())
}

fn print_report(
    output: &mut impl Write,
    report: &PackReport,
    sidecars: Option<usize>,
    json: bool,
) -> std::io::Result<()> {
    if json {
        return writeln!(output, "{}", serde_json::to_string_pretty(report).expect("plain data"));
    }
    writeln!(output, "{}", report.archive)?;
    writeln!(
        output,
        "  {} -> {} bytes ({:.1} %), {:.3} bits per parameter",
        report.source_bytes,
        report.archive_bytes,
        100.0 * report.archive_bytes as f64 / report.source_bytes.max(1) as f64,
        report.bits_per_parameter
    )?;
    if report.lossless {
        writeln!(output, "  decoded and compared: every byte is the original's")?;
    } else {
        writeln!(output, "  decoded and compared: relative squared error {:.3e}", report.relative_squared_error)?;
        if let Some(error) = report.relative_squared_error_of_changes {
            writeln!(output, "  of what changed from the base: relative squared error {error:.3e}")?;
        }
    }
    writeln!(
        output,
        "  {} architecture, {} records as keyframes, {} predicted",
        report.architecture, report.keyframe_records, report.predicted_records
    )?;
    if let Some(sidecars) = sidecars {
        writeln!(output, "  {sidecars} other files copied")?;
    }
    if let Some(calibration) = &report.calibration {
        writeln!(output, "  calibrated with {calibration}")?;
    }
    if let Some(missed) = &report.target_missed {
        writeln!(output, "  target missed: {missed}")?;
    }
    if let Some(stats) = &report.stats {
        writeln!(output, "\n{:>10}  {:<26} instead", "bits/param", "stage saves")?;
        for stage in stats {
            let not_used = if stage.is_used { "" } else { " (not used)" };
            let (bits, name) = (stage.bits_per_parameter, stage.stage);
            writeln!(output, "{bits:>10.4}  {name:<26} {}{not_used}", stage.instead)?;
        }
    }
    Ok(())
}
