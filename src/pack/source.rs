//! The checkpoint to be packed: a `.safetensors` file, or a Hugging Face directory with shards and sidecars.
//!
//! Tensor files are memory-mapped: the encoder may, because a file that is truncated while it is packed ends the run and
//! nothing else (the daemon reads archives with `pread` instead). [`SourceFile::release`] gives pages back, so that the
//! resident memory is that of the layers at hand.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use log::warn;
use memmap2::{Advice, Mmap, UncheckedAdvice};
use sha2::{Digest, Sha256};

use crate::codec::architecture::{CheckpointPlan, PlanFile, plan};
use crate::safetensors::{Header, ModelConfig, SafetensorsError, ShardIndex};
use crate::tensor::total_elements;

mod directory;

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A safetensors file or an index JSON is not what it should be.
    #[error("{}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: SafetensorsError,
    },
    /// A directory without tensors.
    #[error("{}: no .safetensors file in this directory, expected one or more", path.display())]
    NoTensors {
        /// The directory.
        path: PathBuf,
    },
    /// The index names a file that is not there.
    #[error("{}: weight_map: shard `{shard}` of tensor `{tensor}` is not in the directory", index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The missing file.
        shard: String,
        /// A tensor it should hold.
        tensor: String,
    },
    /// The index names a tensor that its shard does not hold.
    #[error("{}: weight_map: tensor `{tensor}` is not in shard `{shard}`", index.display())]
    MissingTensor {
        /// The index.
        index: PathBuf,
        /// The file that should hold it.
        shard: String,
        /// The missing tensor.
        tensor: String,
    },
    /// A name that the archive cannot hold.
    #[error("{}: file name: expected UTF-8", path.display())]
    Name {
        /// The file.
        path: PathBuf,
    },
}

/// An opened checkpoint: its tensor files, mapped, and the names of everything beside them.
#[derive(Debug)]
pub struct Checkpoint {
    /// The path as given: a file or a directory.
    pub path: PathBuf,
    /// The safetensors files, sorted by name.
    pub files: Vec<SourceFile>,
    /// All other regular files of the directory and of those below it, sorted by name; none beside a single file.
    /// Safetensors files of subdirectories are among them.
    pub sidecars: Vec<Sidecar>,
    /// What `config.json` says of the model; also read from beside a single file.
    pub config: Option<ModelConfig>,
}

/// One safetensors file, mapped.
#[derive(Debug)]
pub struct SourceFile {
    /// File name without directories.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its header.
    pub header: Header,
    /// Files that one index names are shards of one model and have the same number; a file of its own is a model.
    pub model: usize,
    map: Mmap,
}

/// A file that is carried byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sidecar {
    /// Path below the checkpoint's directory.
    pub name: PathBuf,
    /// Where to read it.
    pub path: PathBuf,
}

impl Checkpoint {
    /// Opens a `.safetensors` file or a Hugging Face directory and checks headers and indexes; reads no tensor.
    ///
    /// A directory's symbolic links to files are followed wherever they lead, as in the Hugging Face cache; those to
    /// directories only inside it. Directories of version control and download state (`.git`, `.cache`) are left out, and
    /// so are `.mcwc` archives.
    ///
    /// # Errors
    /// When something cannot be read, a file is no safetensors file or has another length than its header says, or an
    /// index names a shard or a tensor that is not there.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let metadata = fs::metadata(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
        if metadata.is_dir() {
            return Self::open_directory(path);
        }
        let file = SourceFile::open(path, 0)?;
        let config = path.parent().and_then(|directory| read_config(&directory.join("config.json")));
        Ok(Self { path: path.to_owned(), files: vec![file], sidecars: Vec::new(), config })
    }

    fn open_directory(path: &Path) -> Result<Self, SourceError> {
        let listing = directory::list(path)?;
        if listing.tensor_files.is_empty() && listing.indexes.is_empty() {
            return Err(SourceError::NoTensors { path: path.to_owned() });
        }
        let mut models = BTreeMap::new(); // shard name -> model
        let mut indexes = Vec::new();
        for (model, index_path) in listing.indexes.iter().enumerate() {
            let bytes = fs::read(index_path).map_err(|source| SourceError::Io { path: index_path.clone(), source })?;
            let index =
                ShardIndex::parse(&bytes).map_err(|source| SourceError::Format { path: index_path.clone(), source })?;
            for shard in index.shards() {
                models.entry(shard.to_owned()).or_insert(model);
            }
            indexes.push((index_path, index));
        }
        let mut files = Vec::new();
        for (position, file) in listing.tensor_files.iter().enumerate() {
            let name = file.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| SourceError::Name { path: file.clone() })?;
            let alone = listing.indexes.len() + position;
            files.push(SourceFile::open(file, models.get(name).copied().unwrap_or(alone))?);
        }
        for (index_path, index) in indexes {
            check_index(index_path, &index, &files)?;
        }
        let config = read_config(&path.join("config.json"));
        Ok(Self { path: path.to_owned(), files, sidecars: listing.sidecars, config })
    }

    /// The tensor files as the planner sees them.
    pub fn plan_files(&self) -> Vec<PlanFile<'_>> {
        self.files.iter().map(|file| PlanFile { model: file.model, tensors: &file.header.tensors }).collect()
    }

    /// The records of the checkpoint.
    pub fn plan(&self) -> CheckpointPlan {
        plan(&self.plan_files(), self.config.as_ref())
    }

    /// Parameters of the checkpoint: elements over all tensors.
    pub fn parameters(&self) -> u64 {
        total_elements(self.files.iter().flat_map(|file| &file.header.tensors))
    }
}

impl SourceFile {
    fn open(path: &Path, model: usize) -> Result<Self, SourceError> {
        let io = |source| SourceError::Io { path: path.to_owned(), source };
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| SourceError::Name { path: path.to_owned() })?.to_owned();
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let header =
            Header::read_from(&file, length).map_err(|source| SourceError::Format { path: path.to_owned(), source })?;
        // SAFETY: the map is only read. If someone truncates the file meanwhile, the run ends with SIGBUS, as documented.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        if map.len() as u64 != length {
            return Err(io(io::Error::other("its length changed while it was opened")));
        }
        // Advice may be refused without harm: then the kernel reads ahead as it would anyway.
        if let Err(error) = map.advise(Advice::Sequential) {
            warn!("no sequential readahead: {}: {error}", path.display());
        }
        Ok(Self { name, path: path.to_owned(), header, model, map })
    }

    /// The bytes of a tensor of this file.
    ///
    /// # Panics
    /// When the header has no tensor of this number.
    pub fn tensor_bytes(&self, tensor: usize) -> &[u8] {
        let (offset, length) = self.range(tensor);
        &self.map[offset..offset + length] // the header fills the file exactly
    }

    /// Gives back the memory of a tensor's pages; reading them again reads the file again.
    ///
    /// # Panics
    /// When the header has no tensor of this number.
    pub fn release(&self, tensor: usize) {
        let (offset, length) = self.range(tensor);
        if length == 0 {
            return;
        }
        // SAFETY: the map is a shared, read-only one of a file: dropped pages come back with the file's contents.
        if let Err(error) = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, length) } {
            warn!("pages not released: {}: {error}", self.path.display());
        }
    }

    /// SHA-256 of the whole file, read as a stream.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn sha256(&self) -> Result<[u8; 32], SourceError> {
        let io = |source| SourceError::Io { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(io)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(hash.finalize().into()),
                Ok(length) => hash.update(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(io(error)),
            }
        }
    }

    /// Offset in the file and length, in bytes.
    fn range(&self, tensor: usize) -> (usize, usize) {
        let info = &self.header.tensors[tensor];
        (self.header.bytes.len() + info.offset_bytes as usize, info.length_bytes as usize)
    }
}

/// Every tensor that the index names is in its shard.
fn check_index(path: &Path, index: &ShardIndex, files: &[SourceFile]) -> Result<(), SourceError> {
    let mut held: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for file in files {
        let mut names: Vec<&str> = file.header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        names.sort_unstable();
        held.insert(&file.name, names);
    }
    for (tensor, shard) in &index.weight_map {
        let (index, tensor, shard) = (path.to_owned(), tensor.clone(), shard.clone());
        match held.get(shard.as_str()) {
            None => return Err(SourceError::MissingShard { index, shard, tensor }),
            Some(names) if names.binary_search(&tensor.as_str()).is_err() => {
                return Err(SourceError::MissingTensor { index, shard, tensor });
            }
            Some(_) => (),
        }
    }
    Ok(())
}

/// The model description, if there is one that can be read: a hint, so nothing depends on it.
fn read_config(path: &Path) -> Option<ModelConfig> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!("packing without a model description: {}: {error}", path.display());
            return None;
        }
    };
    match ModelConfig::parse(&bytes) {
        Ok(config) => Some(config),
        Err(error) => {
            warn!("packing without a model description: {}: {error}", path.display());
            None
        }
    }
}

#[cfg(test)]
mod tests;
