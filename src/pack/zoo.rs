//! A directory of checkpoints: which of them are variants of one another, and which stands alone as their base.
//!
//! Checkpoints belong together where most of their bytes are tensors of the same names, types and columns, and the values of
//! these are near one another. Of those that belong together the one that is nearest to all others is the base; a base
//! stands alone, so every variant is decoded from one other archive at most.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::difference::{mean_distance, spread_elements};
use super::source::{Checkpoint, SourceError};
use crate::tensor::TensorInfo;

/// Elements of a tensor that two checkpoints are compared on.
const COMPARED_ELEMENTS: usize = 1024;
/// Tensors that they are compared on, the largest.
const COMPARED_TENSORS: usize = 12;
/// Share of the bytes that must have a counterpart.
const LEAST_SHARED: f64 = 0.5;
/// Mean distance above which weights have nothing to do with one another, in units of their own spread.
const UNLIKE: f64 = 0.5;

/// One checkpoint of a zoo.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Its directory, from the root of the zoo.
    pub path: PathBuf,
    /// Bytes of its safetensors files.
    pub bytes: u64,
    /// The member that it starts from, and how far it is from it: 0 where they are equal, about 1 where they have nothing
    /// in common. Absent where it stands alone.
    pub base: Option<(usize, f64)>,
}

/// Finds the checkpoints of a tree: directories that hold safetensors files. What lies below one belongs to it. Links to
/// directories are followed wherever they lead, but to none that was seen before.
///
/// # Errors
/// When a directory cannot be listed.
pub fn checkpoints(root: &Path) -> std::io::Result<Vec<PathBuf>> {
    let (mut waiting, mut links, mut found) = (vec![PathBuf::new()], VecDeque::new(), Vec::new());
    let mut seen = BTreeSet::new();
    // Links come last, so that a directory goes by its own name where it has one in the tree.
    while let Some(path) = waiting.pop().or_else(|| links.pop_front()) {
        if !seen.insert(root.join(&path).canonicalize()?) {
            log::warn!("left out, the link leads to what was seen already: {}", path.display());
            continue;
        }
        let (mut below, mut linked) = (Vec::new(), Vec::new());
        let mut is_checkpoint = false;
        for entry in std::fs::read_dir(root.join(&path))? {
            let entry = entry?;
            let name = entry.file_name();
            if entry.file_type()?.is_dir() {
                below.push(path.join(&name));
            } else if entry.path().is_dir() {
                linked.push(path.join(&name));
            }
            is_checkpoint |= Path::new(&name).extension().is_some_and(|extension| extension == "safetensors");
        }
        if is_checkpoint {
            found.push(path);
        } else {
            waiting.extend(below);
            linked.sort();
            links.extend(linked);
        }
    }
    found.sort();
    Ok(found)
}

/// Plans a zoo: every checkpoint with what it starts from, bases before their variants.
///
/// # Errors
/// When a checkpoint cannot be opened.
pub fn plan(root: &Path, paths: Vec<PathBuf>) -> Result<Vec<Member>, SourceError> {
    let opened = paths.iter().map(|path| Checkpoint::open(&root.join(path))).collect::<Result<Vec<_>, _>>()?;
    let pairs: Vec<(usize, usize)> =
        (0..opened.len()).flat_map(|one| (one + 1..opened.len()).map(move |other| (one, other))).collect();
    let distances: BTreeMap<(usize, usize), f64> = pairs
        .into_par_iter()
        .filter_map(|(one, other)| Some(((one, other), distance(&opened[one], &opened[other])?)))
        .collect::<Vec<_>>()
        .into_iter()
        .collect();
    let bytes = |checkpoint: &Checkpoint| checkpoint.files.iter().map(|file| file.header.file_bytes()).sum();
    let members = paths.into_iter().zip(&opened);
    let mut members: Vec<Member> =
        members.map(|(path, checkpoint)| Member { path, bytes: bytes(checkpoint), base: None }).collect();
    let bases = choose_bases(members.len(), &distances);
    for (member, base) in members.iter_mut().zip(bases) {
        member.base = base;
    }
    Ok(members)
}

/// For each member its base and the distance to it. Members that are near one another form a family; the one with the least
/// sum of distances is the base of those near it, and what is left of the family is a family again.
fn choose_bases(members: usize, distances: &BTreeMap<(usize, usize), f64>) -> Vec<Option<(usize, f64)>> {
    let between = |one: usize, other: usize| distances.get(&(one.min(other), one.max(other))).copied();
    let mut left: Vec<usize> = (0..members).collect();
    let mut bases = vec![None; members];
    loop {
        // What a member saves as the base of those near it.
        let saved = |base: usize| -> f64 {
            let near = left.iter().filter(|&&other| other != base).filter_map(|&other| between(base, other));
            near.filter(|&distance| distance < UNLIKE).map(|distance| UNLIKE - distance).sum()
        };
        let best = left.iter().copied().map(|base| (base, saved(base)));
        let best = best.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((base, _)) = best.filter(|&(_, saved)| saved > 0.0) else { return bases };
        left.retain(|&member| {
            let near = between(base, member).filter(|&distance| member != base && distance < UNLIKE);
            if let Some(distance) = near {
                bases[member] = Some((base, distance));
            }
            member != base && near.is_none()
        });
    }
}

/// How far two checkpoints are from one another; `None` where they are not of one architecture.
fn distance(one: &Checkpoint, other: &Checkpoint) -> Option<f64> {
    let tensors = |checkpoint: &'_ Checkpoint| -> Vec<(usize, usize)> {
        let files = checkpoint.files.iter().enumerate();
        files.flat_map(|(file, source)| (0..source.header.tensors.len()).map(move |tensor| (file, tensor))).collect()
    };
    let info = |checkpoint: &'_ Checkpoint, (file, tensor): (usize, usize)| -> TensorInfo {
        checkpoint.files[file].header.tensors[tensor].clone()
    };
    let by_name: BTreeMap<String, (usize, usize)> =
        tensors(other).into_iter().map(|place| (info(other, place).name, place)).collect();
    let mut shared = Vec::new();
    let mut total = 0;
    for place in tensors(one) {
        let tensor = info(one, place);
        total += tensor.length_bytes;
        let Some(&counterpart) = by_name.get(&tensor.name) else { continue };
        let against = info(other, counterpart);
        let columns = |shape: &[u64]| shape.get(1..).map(<[u64]>::to_vec);
        if tensor.dtype == against.dtype && columns(&tensor.shape) == columns(&against.shape) && tensor.length_bytes > 0
        {
            shared.push((tensor.length_bytes, place, counterpart));
        }
    }
    let shared_bytes: u64 = shared.iter().map(|&(bytes, ..): &(u64, _, _)| bytes).sum();
    if total == 0 || (shared_bytes as f64) < LEAST_SHARED * total as f64 {
        return None;
    }
    shared.sort_by_key(|&(bytes, place, _)| (std::cmp::Reverse(bytes), place));
    shared.truncate(COMPARED_TENSORS);
    let (mut sum, mut weight) = (0.0, 0.0);
    for (_, place, counterpart) in shared {
        let (ours, theirs) =
            (one.files[place.0].tensor_bytes(place.1), other.files[counterpart.0].tensor_bytes(counterpart.1));
        let length = ours.len().min(theirs.len());
        let elements = |bytes: &[u8]| spread_elements(&info(one, place), &bytes[..length], COMPARED_ELEMENTS);
        sum += mean_distance(&elements(ours), &elements(theirs)) * length as f64;
        weight += length as f64;
    }
    Some(sum / f64::max(weight, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_member_nearest_to_all_others_is_their_base_and_strangers_stand_alone() {
        // 1 is the base of 0 and 2, 3 and 4 are a family of their own, 5 is a stranger.
        let distances = [((0, 1), 0.1), ((1, 2), 0.1), ((0, 2), 0.2), ((3, 4), 0.01), ((0, 3), 0.9), ((2, 5), 0.7)];
        let bases = choose_bases(6, &distances.into_iter().collect());
        assert_eq!(bases, [Some((1, 0.1)), None, Some((1, 0.1)), None, Some((3, 0.01)), None]);
    }

    #[test]
    fn a_base_stands_alone_even_where_another_is_nearer() {
        let distances = [((0, 1), 0.1), ((1, 2), 0.1), ((2, 3), 0.1), ((1, 3), 0.4), ((0, 2), 0.4), ((0, 3), 0.6)];
        let bases = choose_bases(4, &distances.into_iter().collect());
        for base in bases.iter().flatten() {
            assert_eq!(bases[base.0], None, "{bases:?}");
        }
    }

    #[test]
    fn checkpoints_are_found_at_every_depth_and_own_what_lies_below_them() {
        let root = tempfile::tempdir().expect("a directory");
        for file in ["a/model.safetensors", "a/sub/other.safetensors", "b/c/x.safetensors", "d/readme.md"] {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
            std::fs::write(path, "").expect("a file");
        }
        assert_eq!(checkpoints(root.path()).expect("a tree"), [PathBuf::from("a"), PathBuf::from("b/c")]);
    }

    #[test]
    fn a_linked_member_is_found_once_and_links_in_a_circle_end() {
        let (root, outside) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        for directory in [root.path().join("b"), outside.path().to_owned()] {
            std::fs::create_dir_all(&directory).expect("a directory");
            std::fs::write(directory.join("model.safetensors"), "").expect("a file");
        }
        let link =
            |target: &Path, name: &str| std::os::unix::fs::symlink(target, root.path().join(name)).expect("a link");
        link(outside.path(), "elsewhere");
        link(&root.path().join("b"), "a-second-name-of-b");
        link(root.path(), "circle");
        assert_eq!(checkpoints(root.path()).expect("a tree"), [PathBuf::from("b"), PathBuf::from("elsewhere")]);
    }
}
