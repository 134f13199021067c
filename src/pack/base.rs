//! The base of a variant: which of its tensors each tensor of a checkpoint starts from, and their decoded bytes.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::difference::{mean_distance, spread_elements};
use super::source::{Checkpoint, SourceError};
use crate::archive::{Archive, ArchiveError, is_archive_name};
use crate::format::difference::BaseTensor;
use crate::format::index::BaseReference;
use crate::materialize::{MaterializeError, MaterializeOptions, Materializer};
use crate::tensor::{Dtype, TensorInfo};

/// Cache for reading a base: strips at the edges of what is read at once, and tensors that predictions start from.
const CACHE_BYTES: u64 = 256 << 20;
/// Elements compared to find the counterpart of a tensor that has another name in the base.
const COMPARED_ELEMENTS: usize = 512;
/// Tensors of one shape that are compared for that at most.
const COMPARED_TENSORS: usize = 256;
/// Mean difference above which a tensor is no counterpart, in units of its own values' spread as integers.
const UNLIKE: f64 = 0.5;

/// Why a base cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// It is a checkpoint that cannot be read.
    #[error("base {0}")]
    Source(#[from] SourceError),
    /// It is an archive that cannot be opened.
    #[error("base {0}")]
    Archive(#[from] ArchiveError),
    /// It does not decode.
    #[error("base {0}")]
    Decode(#[from] MaterializeError),
    /// It is a variant itself.
    #[error("base {0}: starts from another base, expected one that stands alone")]
    NotAlone(PathBuf),
    /// It is a directory of several archives.
    #[error("base {path}: {found} archives, expected one")]
    Several {
        /// The directory.
        path: PathBuf,
        /// How many it has.
        found: usize,
    },
}

/// A base, opened.
#[derive(Debug)]
pub struct Base {
    archive: Arc<Archive>,
    materializer: Materializer,
    name: String,
    is_packed: bool,
}

impl Base {
    /// Opens an archive, a directory that holds one, or a checkpoint, which may be a mounted one.
    ///
    /// # Errors
    /// When it is none of these, or does not stand alone.
    pub fn open(path: &Path) -> Result<Self, BaseError> {
        let mut packed = packed_in(path)?;
        if packed.len() > 1 {
            return Err(BaseError::Several { path: path.to_owned(), found: packed.len() });
        }
        let packed = packed.pop();
        let is_packed = packed.is_some();
        let archive = match packed {
            Some(archive) => Archive::open(&archive)?,
            None => {
                let checkpoint = Checkpoint::open(path)?;
                let files: Vec<PathBuf> = checkpoint.files.iter().map(|file| file.path.clone()).collect();
                Archive::of_plain_files(path, &files)?
            }
        };
        if !archive.index().bases.is_empty() {
            return Err(BaseError::NotAlone(path.to_owned()));
        }
        let largest = archive.files().iter().flat_map(|file| &file.tensors).map(|tensor| tensor.length_bytes).max();
        let cache_bytes = CACHE_BYTES.max(2 * largest.unwrap_or(0));
        let options = MaterializeOptions { cache_bytes, ..MaterializeOptions::default() };
        let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name = canonical.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { archive: Arc::new(archive), materializer: Materializer::new(options), name, is_packed })
    }

    /// What an index says of it.
    pub fn reference(&self) -> BaseReference {
        BaseReference { content_id: self.archive.content_id(), name: self.name.clone() }
    }

    /// The base as an archive.
    pub fn archive(&self) -> &Arc<Archive> {
        &self.archive
    }

    /// Whether it is an archive; a checkpoint otherwise, which serves for packing but not for reading a variant.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// A tensor's description.
    pub fn tensor(&self, reference: BaseTensor) -> &TensorInfo {
        &self.archive.files()[reference.file as usize].tensors[reference.tensor as usize]
    }

    /// The first `length` decoded bytes of a tensor, zeros where it is shorter.
    ///
    /// # Errors
    /// When it does not decode.
    pub fn decoded(&self, reference: BaseTensor, length: u64) -> Result<Vec<u8>, MaterializeError> {
        let file = &self.archive.files()[reference.file as usize];
        let tensor = &file.tensors[reference.tensor as usize];
        let mut bytes = vec![0; length as usize];
        let available = tensor.length_bytes.min(length) as usize;
        let offset = file.header.len() as u64 + tensor.offset_bytes;
        self.materializer.read_in_parallel(&self.archive, reference.file as usize, offset, &mut bytes[..available])?;
        Ok(bytes)
    }

    /// For each file and tensor of a checkpoint, the tensor that it may start from: of the same name, else of a name that
    /// ends alike, else the nearest of the same type and shape.
    ///
    /// # Errors
    /// When the base does not decode.
    pub fn counterparts(&self, checkpoint: &Checkpoint) -> Result<Vec<Vec<Option<BaseTensor>>>, BaseError> {
        let mut found: Vec<Vec<Option<BaseTensor>>> =
            checkpoint.files.iter().map(|file| vec![None; file.header.tensors.len()]).collect();
        let mut unclaimed: BTreeSet<(u32, u32)> = self.tensors().map(|(place, _)| place).collect();
        let by_name: BTreeMap<&str, (u32, u32)> =
            self.tensors().map(|(place, tensor)| (tensor.name.as_str(), place)).collect();
        let all = || {
            let files = checkpoint.files.iter().enumerate();
            files.flat_map(|(file, source)| {
                source.header.tensors.iter().enumerate().map(move |(tensor, info)| (file, tensor, info))
            })
        };
        let of = |(file, tensor)| BaseTensor { base: 0, file, tensor };
        for (file, tensor, info) in all() {
            if let Some(&place) = by_name.get(info.name.as_str())
                && may_start_from(info, self.tensor(of(place)))
            {
                found[file][tensor] = Some(of(place));
                unclaimed.remove(&place);
            }
        }
        let mut spread = BTreeMap::new();
        for (file, tensor, info) in all() {
            if found[file][tensor].is_some() {
                continue;
            }
            let alike: Vec<(u32, u32)> = unclaimed
                .iter()
                .copied()
                .filter(|&place| may_start_from(info, self.tensor(of(place))))
                .take(COMPARED_TENSORS)
                .collect();
            let named: Vec<(u32, u32)> =
                (alike.iter().copied()).filter(|&place| ends_alike(&info.name, &self.tensor(of(place)).name)).collect();
            let chosen = match named.as_slice() {
                [place] => Some(*place),
                _ => self.nearest(info, checkpoint.files[file].tensor_bytes(tensor), &alike, &mut spread)?,
            };
            if let Some(place) = chosen {
                found[file][tensor] = Some(of(place));
                unclaimed.remove(&place);
            }
        }
        Ok(found)
    }

    fn tensors(&self) -> impl Iterator<Item = ((u32, u32), &TensorInfo)> {
        let files = self.archive.files().iter().enumerate();
        files.flat_map(|(file, entry)| {
            entry.tensors.iter().enumerate().map(move |(tensor, info)| ((file as u32, tensor as u32), info))
        })
    }

    /// Of tensors of the same shape the one whose values are nearest, unless even that is unlike. `spread` has what is known of
    /// their elements: each is decoded once.
    fn nearest(
        &self,
        tensor: &TensorInfo,
        bytes: &[u8],
        candidates: &[(u32, u32)],
        spread: &mut BTreeMap<(u32, u32), Vec<f64>>,
    ) -> Result<Option<(u32, u32)>, MaterializeError> {
        let elements = spread_elements(tensor, bytes, COMPARED_ELEMENTS);
        let mut nearest: Option<(f64, (u32, u32))> = None;
        for &(file, number) in candidates {
            let reference = BaseTensor { base: 0, file, tensor: number };
            if self.tensor(reference).shape != tensor.shape {
                continue;
            }
            let others = match spread.entry((file, number)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    let decoded = self.decoded(reference, tensor.length_bytes)?;
                    unknown.insert(spread_elements(tensor, &decoded, COMPARED_ELEMENTS))
                }
            };
            let distance = mean_distance(&elements, others);
            if distance < nearest.map_or(UNLIKE, |(least, _)| least) {
                nearest = Some((distance, (file, number)));
            }
        }
        Ok(nearest.map(|(_, place)| place))
    }
}

/// Whether a tensor may start from another: the same type, and the same shape but for the number of rows.
fn may_start_from(tensor: &TensorInfo, base: &TensorInfo) -> bool {
    let has_elements = tensor.length_bytes > 0 && base.length_bytes > 0;
    let is_alike = match (tensor.shape.split_first(), base.shape.split_first()) {
        (Some((_, columns)), Some((_, others))) if !columns.is_empty() => columns == others,
        _ => tensor.shape == base.shape,
    };
    has_elements && tensor.dtype == base.dtype && is_alike && !matches!(tensor.dtype, Dtype::Other(_))
}

/// Whether one name is the other behind a prefix that ends with a dot: what wrapping a model does to names.
fn ends_alike(a: &str, b: &str) -> bool {
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    long.strip_suffix(short).is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

/// The archive at `path`, or those in the directory that it is; none where it is no packed one.
pub(super) fn packed_in(path: &Path) -> Result<Vec<PathBuf>, ArchiveError> {
    let is_archive = |path: &Path| path.file_name().is_some_and(is_archive_name);
    if !path.is_dir() {
        return Ok(is_archive(path).then(|| path.to_owned()).into_iter().collect());
    }
    let entries = std::fs::read_dir(path).map_err(|source| ArchiveError::Io { path: path.to_owned(), source })?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| is_archive(path)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_alike_behind_a_whole_prefix() {
        assert!(ends_alike("model.layers.0.weight", "layers.0.weight"));
        assert!(!ends_alike("layers.10.weight", "0.weight"), "10 is another layer");
        assert!(ends_alike("weight", "weight"));
    }

    #[test]
    fn a_tensor_starts_from_one_of_its_type_and_as_many_columns() {
        let tensor = |dtype: &Dtype, shape: &[u64]| TensorInfo {
            name: String::new(),
            dtype: dtype.clone(),
            shape: shape.to_vec(),
            offset_bytes: 0,
            length_bytes: shape.iter().product::<u64>() * 2,
        };
        let matrix = tensor(&Dtype::BF16, &[10, 4]);
        assert!(may_start_from(&tensor(&Dtype::BF16, &[12, 4]), &matrix), "rows were added");
        assert!(!may_start_from(&tensor(&Dtype::BF16, &[10, 5]), &matrix));
        assert!(!may_start_from(&tensor(&Dtype::F16, &[10, 4]), &matrix));
        assert!(!may_start_from(&tensor(&Dtype::BF16, &[11]), &tensor(&Dtype::BF16, &[10])), "no rows to add");
    }
}
