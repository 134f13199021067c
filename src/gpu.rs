//! Archives straight into a GPU, for programs that link this library: stored bytes go to the device, and weights are decoded
//! there without ever being in the host's memory.
//!
//! ```no_run
//! # use std::{path::Path, sync::Arc};
//! # use mcwcfs::{archive::Archive, gpu::Gpu};
//! let archive = Arc::new(Archive::open(Path::new("model.mcwc"))?);
//! let gpu = Gpu::open(0)?; // the first CUDA device
//! let loaded = gpu.load(&archive)?;
//! loaded.decode()?;
//! let weights = loaded.tensor(0, 3); // where tensor 3 of file 0 lies on the device
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Checksums are looked at on the way, and so is whatever else [`materialize`](crate::materialize) looks at. A chain is decoded
//! one layer after another; of each layer of all chains together all strips are decoded at once. Tensors of a kind that no
//! kernel knows are decoded by the CPU and copied.

mod load;

use std::sync::Arc;

use crate::archive::{Archive, ArchiveError, PartAddress};
use crate::decode::cuda::batch::{STATUS_BYTES, failure};
use crate::decode::cuda::device::{Device, DeviceError, Launch};
use crate::decode::cuda::{CudaDevice, DeviceMemory, PinnedMemory, Stream};
use crate::materialize::{MaterializeError, decode_error};

/// Why an archive is not on the device.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no device, it has too little memory, or it has failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The archive cannot be read, or does not decode.
    #[error(transparent)]
    Archive(#[from] MaterializeError),
}

impl From<ArchiveError> for GpuError {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error.into())
    }
}

/// A device to decode on.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: Arc<dyn Device>,
}

/// Where a tensor lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTensor {
    /// Address of its first byte, a multiple of 256.
    pub address: u64,
    /// Its length.
    pub length_bytes: u64,
}

/// An archive on a device: what is stored of it, and room for its tensors, which [`Self::decode`] fills. All of it is given
/// back when this is dropped.
#[derive(Debug)]
pub struct Loaded {
    device: Arc<dyn Device>,
    archive: Arc<Archive>,
    /// Those that its parts start from, decoded before it.
    _bases: Vec<Loaded>,
    /// By file and tensor.
    tensors: Vec<Vec<DeviceTensor>>,
    /// In an order in which they can be decoded.
    chunks: Vec<Chunk>,
    /// The tensors' memory.
    _memory: DeviceMemory,
}

/// Strips that have been copied to the device together.
#[derive(Debug)]
struct Chunk {
    launches: Vec<Launch>,
    statuses: u64,
    /// Part and strip of each status.
    strips: Vec<(PartAddress, usize)>,
    /// The batch's memory.
    _memory: DeviceMemory,
}

impl Gpu {
    /// CUDA's device number `ordinal`.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        Ok(Self::on(Arc::new(CudaDevice::new(ordinal)?)))
    }

    /// A device that is open already.
    pub fn on(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Copies an archive to the device, and the bases that it starts from; nothing is decoded yet but those.
    pub fn load(&self, archive: &Arc<Archive>) -> Result<Loaded, GpuError> {
        load::load(&self.device, archive, &|_| 0)
    }
}

impl Loaded {
    /// Decodes all tensors, again where they are decoded already.
    pub fn decode(&self) -> Result<(), GpuError> {
        let stream = Stream::new(&self.device)?;
        for launch in self.chunks.iter().flat_map(|chunk| &chunk.launches) {
            // SAFETY: `load` has described strips that were checked, in memory that lives as long as `self`; the stream is
            // done with it below, or when it is dropped.
            unsafe { self.device.launch(stream.number(), *launch)? };
        }
        stream.synchronize()?;
        self.check(&stream)
    }

    /// Looks at how every strip went.
    fn check(&self, stream: &Stream) -> Result<(), GpuError> {
        let most = self.chunks.iter().map(|chunk| chunk.strips.len() * STATUS_BYTES).max().unwrap_or(0);
        let mut statuses = PinnedMemory::new(&self.device, most)?;
        for chunk in &self.chunks {
            let bytes = &mut statuses[..chunk.strips.len() * STATUS_BYTES];
            self.copy_back(stream, bytes, chunk.statuses)?;
            for (status, &(address, strip)) in bytes.as_chunks().0.iter().zip(&chunk.strips) {
                if status != &[0; STATUS_BYTES] {
                    return Err(self.strip_error(status, address, strip));
                }
            }
        }
        Ok(())
    }

    fn strip_error(&self, status: &[u8; STATUS_BYTES], address: PartAddress, strip: usize) -> GpuError {
        let record = match crate::materialize::prepare_record(&self.archive, address.record) {
            Ok(record) => record,
            Err(error) => return error.into(),
        };
        match failure(&record[address.part as usize], strip, status) {
            Ok(Some(error)) => decode_error(&self.archive, address, error).into(),
            Ok(None) => unreachable!("a status of zeros is asked for by nobody"),
            Err(error) => {
                let (device, reason) = (self.device.name().to_owned(), error.to_string());
                DeviceError::Failed { device, operation: "decoding", reason }.into()
            }
        }
    }

    fn copy_back(&self, stream: &Stream, to: &mut [u8], from: u64) -> Result<(), DeviceError> {
        // SAFETY: both are owned by `self` and the caller, who waits for the copy here whatever happens.
        let given = unsafe { self.device.download(stream.number(), to, from) };
        stream.synchronize().and(given)
    }

    /// How many tensors a file has.
    pub fn tensors(&self, file: usize) -> usize {
        self.tensors[file].len()
    }

    /// Where a tensor lies: by file, and in it by the order of data.
    pub fn tensor(&self, file: usize, tensor: usize) -> DeviceTensor {
        self.tensors[file][tensor]
    }

    /// Bytes of all tensors.
    pub fn decoded_bytes(&self) -> u64 {
        self.tensors.iter().flatten().map(|tensor| tensor.length_bytes).sum()
    }

    /// A tensor's bytes, copied to the host.
    pub fn read_back(&self, file: usize, tensor: usize) -> Result<PinnedMemory, GpuError> {
        let DeviceTensor { address, length_bytes } = self.tensor(file, tensor);
        let mut bytes = PinnedMemory::new(&self.device, length_bytes as usize)?;
        let stream = Stream::new(&self.device)?;
        self.copy_back(&stream, &mut bytes[..length_bytes as usize], address)?;
        Ok(bytes)
    }
}
