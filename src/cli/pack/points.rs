//! The archives of one run: one, or one for each rate of a sweep, and what is written about them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::gates::GateResult;
use super::{Bar, Destination, PackArgs, PackCommandError, Phase, io_at};
use crate::cli::card::card;
use crate::cli::report::{Subject, write_report};
use crate::pack::base::Base;
use crate::pack::encode::{Encoder, PackError, hidden_file};
use crate::pack::options::{PackOptions, Target};
use crate::pack::report::PackReport;
use crate::pack::source::Checkpoint;

/// The phase of a run that is no part of packing.
const EVALUATING: &str = "evaluating";
/// The table's name in the output of a sweep.
const SWEEP: &str = "sweep.json";

/// One archive of a run.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Point {
    /// What packing did.
    #[serde(flatten)]
    pub(in crate::cli) report: PackReport,
    /// Seconds that packing took, the comparison at the end included; of a sweep, what all archives share is the first's.
    pub(in crate::cli) encode_seconds: f64,
    /// The same by phase, and the evaluation.
    pub(in crate::cli) phases: Vec<Phase>,
    /// What every `--fail-if` found.
    pub(in crate::cli) gates: Vec<GateResult>,
    #[serde(skip)]
    archive: PathBuf,
}

impl Point {
    /// Whether no `--fail-if` holds.
    pub(in crate::cli) fn passes(&self) -> bool {
        self.gates.iter().all(|gate| gate.passed)
    }
}

/// The archive that matters: the smallest that passes every gate; where there are no gates, or none passes, the first.
pub(super) fn choose(points: &[Point]) -> usize {
    let has_gates = points.iter().any(|point| !point.gates.is_empty());
    let passing = points.iter().enumerate().filter(|(_, point)| has_gates && point.passes());
    passing.min_by_key(|(_, point)| point.report.archive_bytes).map_or(0, |(number, _)| number)
}

/// Where everything goes.
pub(super) struct Outputs {
    destinations: Vec<Destination>,
    /// Holds the directories of a sweep.
    sweep: Option<PathBuf>,
    /// What is written beside the archives.
    others: Vec<PathBuf>,
}

impl Outputs {
    /// A destination for each set of options.
    pub(super) fn of(
        args: &PackArgs,
        checkpoint: &Checkpoint,
        options: &[PackOptions],
    ) -> Result<Self, PackCommandError> {
        let judgement = &args.judgement;
        let page = judgement.report.iter().flat_map(|page| [page.clone(), page.with_extension("json")]);
        let mut others: Vec<PathBuf> = page.chain(judgement.card.clone()).collect();
        if args.target.sweep.is_none() {
            let destination = Destination::of(&args.output, checkpoint)?;
            return Ok(Self { destinations: vec![destination], sweep: None, others });
        }
        let names_archive = args.output.extension().is_some_and(|extension| extension == "mcwc");
        if !args.output.is_dir() && (names_archive || args.output.exists()) {
            return Err(PackCommandError::NoSweepDirectory(args.output.clone()));
        }
        others.push(args.output.join(SWEEP));
        let directories = options.iter().map(|options| match options.target {
            Target::BitsPerParameter(rate) => args.output.join(format!("{rate}bpp")),
            Target::Lossless | Target::RelativeSquaredError(_) => unreachable!("a sweep is of rates"),
        });
        let destinations = directories.map(|directory| Destination::of(&directory, checkpoint));
        Ok(Self { destinations: destinations.collect::<Result<_, _>>()?, sweep: Some(args.output.clone()), others })
    }

    /// An error where any of it is there already.
    pub(super) fn refuse_existing(&self, checkpoint: &Checkpoint) -> Result<(), PackCommandError> {
        self.destinations.iter().try_for_each(|destination| destination.refuse_existing(&checkpoint.sidecars))?;
        match self.others.iter().find(|path| path.symlink_metadata().is_ok()) {
            Some(path) => Err(PackError::Exists(path.clone()).into()),
            None => Ok(()),
        }
    }

    /// The archives to be made.
    pub(super) fn archives(&self) -> impl Iterator<Item = &Path> {
        self.destinations.iter().map(|destination| destination.archive.as_path())
    }

    /// Whether sidecars go with each archive.
    pub(super) fn copies_sidecars(&self) -> bool {
        self.destinations.iter().any(Destination::has_directory)
    }

    /// Makes every archive. What is learned of the checkpoint is learned once.
    pub(super) fn fill<'a>(
        &self,
        args: &PackArgs,
        options: &'a [PackOptions],
        mut encoder: Encoder<'a>,
        checkpoint: &Checkpoint,
        progress: &Bar,
    ) -> Result<Vec<Point>, PackCommandError> {
        if let Some(directory) = &self.sweep {
            fs::create_dir_all(directory).map_err(io_at(directory))?;
            encoder.remember()?;
        }
        let mut points = Vec::with_capacity(options.len());
        for (options, destination) in options.iter().zip(&self.destinations) {
            if self.sweep.is_some() {
                encoder.retarget(options);
                progress.bar.println(destination.archive.display().to_string());
            }
            let report = destination.fill(&encoder, &checkpoint.sidecars, args.force)?;
            let phases = progress.take_phases();
            let packing = phases.iter().filter(|phase| phase.phase != EVALUATING);
            points.push(Point {
                encode_seconds: packing.map(|phase| phase.seconds).sum(),
                gates: args.judgement.fail_if.iter().map(|gate| gate.judge(&report)).collect(),
                archive: destination.archive.clone(),
                report,
                phases,
            });
        }
        Ok(points)
    }

    /// Writes what there is to say of the archives: the table of a sweep, the card and the report of the one that matters.
    pub(super) fn describe(
        &self,
        args: &PackArgs,
        checkpoint: &Checkpoint,
        base: Option<&Base>,
        points: &[Point],
        chosen: usize,
    ) -> Result<(), PackCommandError> {
        if let Some(directory) = &self.sweep {
            let table = serde_json::to_string_pretty(&Sweep { points, chosen }).expect("plain data");
            write_whole(&directory.join(SWEEP), &table)?;
        }
        let PackArgs { judgement, .. } = args;
        if judgement.card.is_none() && judgement.report.is_none() {
            return Ok(());
        }
        let mut archive = crate::archive::Archive::open(&points[chosen].archive).map_err(PackError::from)?;
        let needed = base.iter().take(archive.index().bases.len());
        let bases = needed.map(|base| std::sync::Arc::clone(base.archive())).collect();
        archive.attach_bases(bases).map_err(PackError::from)?;
        if let Some(path) = &judgement.card {
            write_whole(path, &card(&archive))?;
        }
        if let Some(page) = &judgement.report {
            write_report(page, &Subject { checkpoint, archive: &archive, points, chosen })?;
        }
        Ok(())
    }
}

/// The archives of a sweep, and which of them matters.
#[derive(Serialize)]
pub(super) struct Sweep<'a> {
    pub(super) points: &'a [Point],
    pub(super) chosen: usize,
}

/// Writes a file under a temporary name, then gives it its own.
pub(in crate::cli) fn write_whole(path: &Path, text: &str) -> Result<(), PackCommandError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = hidden_file(directory, "").map_err(io_at(path))?;
    file.write_all(text.as_bytes()).map_err(io_at(path))?;
    file.persist(path).map_err(|error| io_at(path)(error.error))?;
    Ok(())
}
