//! The checkpoint in aligned coordinates: the same function, the blocks of all layers lined up with the first's.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use indicatif::ProgressBar;

use super::AnalyzeError;
use super::report::{pairs, release, vectors};
use crate::codec::architecture::CheckpointPlan;
use crate::codec::blocks::{AxisLayout, gather_bytes};
use crate::codec::permutation::GroupedPermutation;
use crate::pack::align::{Alignment, align};
use crate::pack::source::{Checkpoint, SourceFile};

/// Where the elements of a tensor come from: along an axis, the index that each one had.
struct Move {
    layout: AxisLayout,
    map: Vec<u32>,
}

/// Refuses a directory that holds something.
pub(super) fn check_target(directory: &Path) -> Result<(), AnalyzeError> {
    match fs::read_dir(directory) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(AnalyzeError::NotEmpty { path: directory.to_owned() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(AnalyzeError::Write { path: directory.to_owned(), source }),
    }
}

/// Writes the aligned tensor files, with their headers as they are, and copies the sidecars. The directory appears when
/// it is complete.
pub(super) fn write(
    checkpoint: &Checkpoint,
    plan: &CheckpointPlan,
    directory: &Path,
    progress: &ProgressBar,
) -> Result<(), AnalyzeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| AnalyzeError::Write { path, source }
    };
    let moves = moves(checkpoint, plan, progress);
    let parent = match directory.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let unfinished = tempfile::Builder::new()
        .prefix(".mcwcfs-aligned-")
        .permissions(Permissions::from_mode(0o777)) // less the user's mask, like any directory
        .tempdir_in(parent)
        .map_err(failed(directory))?;
    for (number, file) in checkpoint.files.iter().enumerate() {
        let path = unfinished.path().join(&file.name);
        write_file(file, number, &moves, &path).map_err(failed(&path))?;
    }
    for sidecar in &checkpoint.sidecars {
        let path = unfinished.path().join(&sidecar.name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed(parent))?;
        }
        fs::copy(&sidecar.path, &path).map_err(failed(&sidecar.path))?;
    }
    fs::rename(unfinished.path(), directory).map_err(failed(directory))?;
    drop(unfinished.keep()); // it has its name now
    Ok(())
}

/// Aligns layer by layer and follows the chain down to its first layer: which tensors move, and how.
fn moves(checkpoint: &Checkpoint, plan: &CheckpointPlan, progress: &ProgressBar) -> HashMap<(usize, usize), Vec<Move>> {
    let pairs = pairs(checkpoint, plan);
    progress.set_length(pairs.len() as u64);
    progress.set_position(0);
    progress.set_message("layers aligned");
    let mut moves = HashMap::new();
    // Of each record that is not first in its chain: from its blocks to those of the first.
    let mut chained: HashMap<_, GroupedPermutation> = HashMap::new();
    for (record, previous) in pairs {
        progress.inc(1);
        let (Some(upper), Some(lower)) = (vectors(checkpoint, record), vectors(checkpoint, previous)) else { continue };
        let (layer, block_type) = (record.layer.unwrap_or_default(), record.block_type);
        let to_previous = align(Alignment::Similarity, block_type, layer, &lower, &upper);
        let to_first = match previous.layer.and_then(|below| chained.get(&(below, block_type))) {
            Some(below) => to_previous.then(below),
            None => to_previous,
        };
        // Place `to_first[i]` takes block i.
        let from = to_first.inverse();
        for part in &record.parts {
            let shape = &checkpoint.files[part.file].header.tensors[part.tensor].shape;
            let placements = part.placement.into_iter().chain(part.conjugated.into_iter().flatten());
            let of_part = placements.map(|placement| {
                let layout = AxisLayout::new(shape, placement.axis).expect("the planner has checked the placement");
                Move { layout, map: placement.index_map(&from) }
            });
            moves.insert((part.file, part.tensor), of_part.collect());
        }
        chained.insert((layer, block_type), to_first);
        release(checkpoint, previous);
    }
    moves
}

fn write_file(
    file: &SourceFile,
    number: usize,
    moves: &HashMap<(usize, usize), Vec<Move>>,
    path: &Path,
) -> Result<(), io::Error> {
    let mut output = BufWriter::new(File::create_new(path)?);
    output.write_all(&file.header.bytes)?;
    for tensor in 0..file.header.tensors.len() {
        let bytes = file.tensor_bytes(tensor);
        match moves.get(&(number, tensor)) {
            Some(moves) => {
                let elements = file.header.tensors[tensor].elements().max(1) as usize;
                let mut moved = bytes.to_vec();
                for Move { layout, map } in moves {
                    let source = moved.clone();
                    gather_bytes(&source, &mut moved, *layout, bytes.len() / elements, map);
                }
                output.write_all(&moved)?;
            }
            None => output.write_all(bytes)?,
        }
        file.release(tensor);
    }
    output.into_inner()?.sync_all()
}
