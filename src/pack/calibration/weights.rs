//! The weights that a model is run with: a checkpoint's own, or what is deployed of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

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

/// A checkpoint's weights, some of them as they decode.
pub(super) struct DeployedWeights<'a> {
    original: CheckpointWeights<'a>,
    decoded: Mutex<BTreeMap<String, Vec<f32>>>,
}

impl<'a> DeployedWeights<'a> {
    /// Nothing is decoded yet.
    pub(super) fn new(original: CheckpointWeights<'a>) -> Self {
        Self { original, decoded: Mutex::default() }
    }

    /// From now on a tensor has these values.
    pub(super) fn deploy(&self, name: &str, values: Vec<f32>) {
        self.decoded().insert(name.to_owned(), values);
    }

    /// Forgets the decoded values of all tensors but these.
    pub(super) fn retain(&self, is_kept: impl Fn(&str) -> bool) {
        self.decoded().retain(|name, _| is_kept(name));
    }

    fn decoded(&self) -> MutexGuard<'_, BTreeMap<String, Vec<f32>>> {
        self.decoded.lock().expect("nothing panics while it holds the lock")
    }
}

impl Weights for DeployedWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.original.shape(name)
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        let decoded = self.decoded().get(name).cloned();
        decoded.or_else(|| self.original.values(name))
    }

    fn names(&self) -> Vec<String> {
        self.original.names()
    }
}
