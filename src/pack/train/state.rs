//! The state of training on disk, so that a run that was stopped goes on to the same bytes.
//!
//! A safetensors file: the latent weights of every tensor, as they were when it was quantized or as they are now, and the
//! moments of those still ahead. Records are quantized again when a run goes on; that is quick, and gives what it gave before.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::optimizer::Moments;
use crate::pack::encode::hidden_file;
use crate::pack::quantize::values_of;
use crate::safetensors::{Header, NewTensor, write_file};
use crate::tensor::{Dtype, TensorInfo};

/// Beginnings of the tensors' names in the file.
const LATENTS: &str = "latents.";
const FIRST: &str = "first_moment.";
const SECOND: &str = "second_moment.";

/// What training has come to.
#[derive(Default)]
pub struct State {
    /// Stages done.
    pub stage: usize,
    /// Steps done.
    pub step: usize,
    /// Latent weights, those that were quantized already included.
    pub latents: BTreeMap<String, Vec<f32>>,
    /// Of what is still ahead.
    pub moments: BTreeMap<String, Moments>,
}

/// Where a state is kept, and what it is the state of.
pub struct StateFile {
    path: PathBuf,
    /// Of the inputs, options and weights: a state of others is not gone on from.
    fingerprint: [u8; 32],
}

impl StateFile {
    /// One encoding's in a directory.
    pub fn new(directory: &Path, encoding: usize, fingerprint: [u8; 32]) -> Self {
        Self { path: directory.join(format!("training-{encoding}.safetensors")), fingerprint }
    }

    /// The state that was kept; `None` where there is none, or one of something else.
    pub fn load(&self) -> Option<State> {
        let bytes = std::fs::read(&self.path).ok()?;
        let state = self.parse(&bytes);
        if state.is_none() {
            log::warn!("{}: the state of another run, or damaged: training starts again", self.path.display());
        }
        state
    }

    fn parse(&self, bytes: &[u8]) -> Option<State> {
        let header = Header::read_from(bytes, bytes.len() as u64).ok()?;
        let data = |tensor: &TensorInfo| {
            let start = header.bytes.len() + tensor.offset_bytes as usize;
            bytes.get(start..start + tensor.length_bytes as usize)
        };
        let find = |name: &str| header.tensors.iter().find(|tensor| tensor.name == name).and_then(data);
        if find("fingerprint")? != self.fingerprint {
            return None;
        }
        let number = |name: &str| Some(usize::from_le_bytes(find(name)?.try_into().ok()?));
        let floats = |name: &str| Some(values_of(&Dtype::F32, find(name)?));
        let mut state = State { stage: number("stage")?, step: number("step")?, ..State::default() };
        for tensor in header.tensors.iter().filter(|tensor| tensor.dtype == Dtype::F32) {
            if let Some(name) = tensor.name.strip_prefix(LATENTS) {
                state.latents.insert(name.to_owned(), floats(&tensor.name)?);
            } else if let Some(name) = tensor.name.strip_prefix(FIRST) {
                let second = floats(&format!("{SECOND}{name}"))?;
                state.moments.insert(name.to_owned(), Moments::restored(floats(&tensor.name)?, second, state.step));
            }
        }
        Some(state)
    }

    /// Keeps a state in place of the one before.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn save<'s>(
        &self,
        stage: usize,
        step: usize,
        latents: impl Iterator<Item = (&'s str, &'s [f32])>,
        moments: &BTreeMap<String, Moments>,
    ) -> Result<(), StateError> {
        let bytes_of = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |name: String, values: &[f32]| (name, Dtype::F32, vec![values.len()], bytes_of(values));
        let mut tensors = vec![
            ("fingerprint".to_owned(), Dtype::U8, vec![32], self.fingerprint.to_vec()),
            ("stage".to_owned(), Dtype::U64, vec![1], stage.to_le_bytes().to_vec()),
            ("step".to_owned(), Dtype::U64, vec![1], step.to_le_bytes().to_vec()),
        ];
        tensors.extend(latents.map(|(name, values)| floats(format!("{LATENTS}{name}"), values)));
        for (name, moments) in moments {
            let [first, second] = moments.means();
            tensors.extend([floats(format!("{FIRST}{name}"), first), floats(format!("{SECOND}{name}"), second)]);
        }
        let tensors: Vec<NewTensor<'_>> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| NewTensor { name, dtype: dtype.clone(), shape, bytes })
            .collect();
        let bytes = write_file(&tensors, &[]).expect("every tensor is as long as its shape says");
        let failed = |source| StateError { path: self.path.clone(), source };
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(failed)?;
        let temporary = hidden_file(directory, "").map_err(failed)?;
        std::fs::write(temporary.path(), bytes).map_err(failed)?;
        temporary.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

/// A state cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct StateError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_back_and_one_of_something_else_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = StateFile::new(directory.path(), 1, [7; 32]);
        assert!(file.load().is_none(), "nothing is there");
        let moments = BTreeMap::from([("b".to_owned(), Moments::restored(vec![0.5], vec![0.25], 9))]);
        let latents: [(&str, &[f32]); 2] = [("a", &[1.0, -2.0]), ("b", &[3.0])];
        file.save(4, 9, latents.into_iter(), &moments).expect("it is written");
        let state = file.load().expect("it is there");
        assert_eq!((state.stage, state.step), (4, 9));
        assert_eq!(state.latents["a"], [1.0, -2.0]);
        assert_eq!(state.moments["b"].means(), [[0.5].as_slice(), &[0.25]]);
        assert!(StateFile::new(directory.path(), 1, [8; 32]).load().is_none(), "of other options");
        assert!(StateFile::new(directory.path(), 2, [7; 32]).load().is_none(), "of another encoding");
        let bytes = std::fs::read(&file.path).expect("the file");
        std::fs::write(&file.path, &bytes[..bytes.len() - 1]).expect("the file");
        assert!(file.load().is_none(), "cut short");
    }
}
