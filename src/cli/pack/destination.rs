//! Where an archive goes, and what goes with it.

use std::path::{Path, PathBuf};

use super::PackCommandError;
use crate::cli::lies_inside;
use crate::pack::encode::{Encoder, PackError, hidden_file};
use crate::pack::report::PackReport;
use crate::pack::source::{Checkpoint, Sidecar};

/// Where the output goes.
pub(in crate::cli) struct Destination {
    pub(in crate::cli) archive: PathBuf,
    /// Receives sidecars; absent where a file was named.
    directory: Option<PathBuf>,
}

impl Destination {
    pub(in crate::cli) fn of(output: &Path, checkpoint: &Checkpoint) -> Result<Self, PackCommandError> {
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

    /// Whether sidecars go with the archive.
    pub(super) fn has_directory(&self) -> bool {
        self.directory.is_some()
    }

    pub(super) fn refuse_existing(&self, sidecars: &[Sidecar]) -> Result<(), PackCommandError> {
        let copies = self.directory.iter().flat_map(|directory| sidecars.iter().map(|file| directory.join(&file.name)));
        match std::iter::once(self.archive.clone()).chain(copies).find(|path| path.symlink_metadata().is_ok()) {
            Some(path) => Err(PackError::Exists(path).into()),
            None => Ok(()),
        }
    }

    /// Packs, copies the sidecars, and gives the archive its name last: what fails before leaves nothing behind.
    pub(in crate::cli) fn fill(
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

pub(in crate::cli) fn io_at(path: &Path) -> impl FnOnce(std::io::Error) -> PackCommandError {
    let path = path.to_owned();
    move |source| PackCommandError::Io { path, source }
}

/// Copies sidecars under temporary names; they get their own once all are there.
pub(in crate::cli) fn copy_sidecars(sidecars: &[Sidecar], directory: &Path) -> Result<(), PackCommandError> {
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
