//! The weights of the model on its way into the archive.

use std::collections::{BTreeMap, BTreeSet};

use crate::forward::Weights;

/// A checkpoint's weights, of which some are latent and some as they decode.
pub struct Student<'a> {
    checkpoint: &'a dyn Weights,
    /// In place of the checkpoint's.
    values: BTreeMap<String, Vec<f32>>,
    latent: BTreeSet<String>,
}

impl<'a> Student<'a> {
    /// All of these tensors are latent, with the checkpoint's values.
    pub fn new(checkpoint: &'a dyn Weights, tensors: &[&str]) -> Self {
        let values = tensors.iter().filter_map(|&name| Some((name.to_owned(), checkpoint.values(name)?)));
        let values: BTreeMap<String, Vec<f32>> = values.collect();
        let latent = values.keys().cloned().collect();
        Self { checkpoint, values, latent }
    }

    /// The latent weights of a tensor that has some.
    pub fn latents(&self, name: &str) -> Option<&[f32]> {
        self.latent.contains(name).then(|| self.values[name].as_slice())
    }

    /// All of them.
    pub fn all_latents(&self) -> impl Iterator<Item = (&str, &[f32])> {
        self.latent.iter().map(|name| (name.as_str(), self.values[name].as_slice()))
    }

    /// Calls `change` with the latent weights of a tensor that has some, and the checkpoint's.
    pub fn change(&mut self, name: &str, change: impl FnOnce(&mut [f32], &[f32])) {
        if self.latent.contains(name) {
            let original = self.checkpoint.values(name).expect("it had values when it became latent");
            change(self.values.get_mut(name).expect("latent tensors have values"), &original);
        }
    }

    /// Whether anything is left to be trained.
    pub fn has_latents(&self) -> bool {
        !self.latent.is_empty()
    }

    /// From now on a tensor has these values; or the checkpoint's again.
    pub fn settle(&mut self, name: &str, decoded: Option<Vec<f32>>) {
        self.latent.remove(name);
        match decoded {
            Some(decoded) => self.values.insert(name.to_owned(), decoded),
            None => self.values.remove(name),
        };
    }
}

impl Weights for Student<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.shape(name)
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        self.values.get(name).cloned().or_else(|| self.checkpoint.values(name))
    }

    fn names(&self) -> Vec<String> {
        self.checkpoint.names()
    }
}
