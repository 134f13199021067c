//! `mcwcfs analyze`: how well the layers of a checkpoint foretell one another (Appendices I and M).
//!
//! For each block type: cosine similarity, explained variance and residual energy of a scaled copy of the layer below,
//! before and after alignment, what the permutations cost, and what is left of the gain, beside Gaussian noise of the
//! same shape, which alignment also finds likenesses in. Biases are outside the blocks.

mod aligned;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::pack::source::{Checkpoint, SourceError};

pub use report::{Comparison, Report, ResidualMagnitudes, Spread, TypeReport};

/// Arguments of `mcwcfs analyze`.
#[derive(Args, Clone, Debug)]
pub struct AnalyzeArgs {
    /// A .safetensors file or a Hugging Face directory
    pub checkpoint: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Also write the checkpoint with the blocks of every layer lined up with those of the first: the same function in
    /// other coordinates. DIR must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub write_aligned: Option<PathBuf>,
    /// What the Gaussian control starts from
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
}

/// Why an analysis ended early.
#[derive(Debug, thiserror::Error)]
pub enum AnalyzeError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The aligned checkpoint would overwrite something.
    #[error("{}: not empty, expected a directory that does not exist or is empty", path.display())]
    NotEmpty {
        /// The directory given.
        path: PathBuf,
    },
    /// Writing failed.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The report could not be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Analyzes a checkpoint and prints what it found on standard output; progress goes to standard error.
///
/// # Errors
/// When the checkpoint cannot be read, or the aligned one not be written.
pub fn run(args: &AnalyzeArgs) -> Result<(), AnalyzeError> {
    run_to(args, &mut io::stdout().lock())
}

fn run_to(args: &AnalyzeArgs, output: &mut impl Write) -> Result<(), AnalyzeError> {
    if let Some(directory) = &args.write_aligned {
        aligned::check_target(directory)?; // before the work, not after it
    }
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let plan = checkpoint.plan();
    let progress = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}").expect("a constant template that is well formed"),
    );
    let report = Report::of(&checkpoint, &plan, args.seed, &progress);
    if let Some(directory) = &args.write_aligned {
        aligned::write(&checkpoint, &plan, directory, &progress)?;
    }
    progress.finish_and_clear();
    if args.json {
        serde_json::to_writer_pretty(&mut *output, &report).map_err(io::Error::from)?;
        writeln!(output)?;
    } else {
        write!(output, "{report}")?;
    }
    Ok(output.flush()?)
}

#[cfg(test)]
mod tests;
