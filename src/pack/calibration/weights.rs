//! The weights that a model is run with: a checkpoint's own.

use std::collections::BTreeMap;

use crate::forward::Weights;
use crate::pack::quantize::values_of;
use crate::pack::source::Checkpoint;
use crate::tensor::Dtype;

/// The checkpoint's own weights.
pub(in crate::pack) struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    /// File and tensor.
    places: BTreeMap<&'a str, (usize, usize)>,
}

impl<'a> CheckpointWeights<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Self {
        let files = checkpoint.files.iter().enumerate();
        let places = files.flat_map(|(file, source)| {
            let tensors = source.header.tensors.iter().enumerate();
            tensors.map(move |(tensor, info)| (info.name.as_str(), (file, tensor)))
        });
        Self { checkpoint, places: places.collect() }
    }
}

impl Weights for CheckpointWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let &(file, tensor) = self.places.get(name)?;
        let shape = &self.checkpoint.files[file].header.tensors[tensor].shape;
        shape.iter().map(|&dimension| usize::try_from(dimension).ok()).collect()
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        let &(file, tensor) = self.places.get(name)?;
        let source = &self.checkpoint.files[file];
        let info = &source.header.tensors[tensor];
        let is_float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let values = is_float.then(|| values_of(&info.dtype, source.tensor_bytes(tensor)));
        source.release(tensor);
        values
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().map(|&name| name.to_owned()).collect()
    }
}
