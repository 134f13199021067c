//! The weights of a model as its archive decodes them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::quantize::values_of;
use crate::archive::Archive;
use crate::forward::Weights;
use crate::materialize::{MaterializeError, MaterializeOptions, Materializer};
use crate::tensor::Dtype;

/// Cache beside the tensors that predictions start from: strips at the edges of what is read at once.
const CACHE_BYTES: u64 = 8 << 20;

/// An archive's tensors by name, decoded when they are asked for.
pub(super) struct ArchiveWeights {
    archive: Arc<Archive>,
    materializer: Materializer,
    /// File and tensor.
    places: BTreeMap<String, (usize, usize)>,
    /// The first tensor that did not decode: [`Weights`] has no word for it.
    error: Mutex<Option<MaterializeError>>,
}

impl ArchiveWeights {
    pub(super) fn new(archive: &Arc<Archive>) -> Self {
        let files = archive.files().iter().enumerate();
        let places = files.flat_map(|(file, archived)| {
            let tensors = archived.tensors.iter().enumerate();
            tensors.map(move |(tensor, info)| (info.name.clone(), (file, tensor)))
        });
        let largest = archive.files().iter().flat_map(|file| &file.tensors).map(|tensor| tensor.length_bytes).max();
        let cache_bytes = CACHE_BYTES + 2 * largest.unwrap_or(0);
        Self {
            archive: Arc::clone(archive),
            materializer: Materializer::new(MaterializeOptions { cache_bytes, ..MaterializeOptions::default() }),
            places: places.collect(),
            error: Mutex::new(None),
        }
    }

    /// What went wrong, if anything.
    pub(super) fn into_error(self) -> Option<MaterializeError> {
        self.error.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Weights for ArchiveWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let &(file, tensor) = self.places.get(name)?;
        let shape = &self.archive.files()[file].tensors[tensor].shape;
        shape.iter().map(|&dimension| usize::try_from(dimension).ok()).collect()
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        let &(file, tensor) = self.places.get(name)?;
        let archived = &self.archive.files()[file];
        let info = &archived.tensors[tensor];
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return None;
        }
        let mut bytes = vec![0; info.length_bytes as usize];
        let offset = archived.header.len() as u64 + info.offset_bytes;
        match self.materializer.read_in_parallel(&self.archive, file, offset, &mut bytes) {
            Ok(()) => Some(values_of(&info.dtype, &bytes)),
            Err(error) => {
                self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                None
            }
        }
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }
}
