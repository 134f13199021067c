//! What decoding needs of a device: memory, copies, launches.

use std::ptr::NonNull;

/// Why a device did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver, or no device that it could drive.
    #[error("no CUDA device: {0}")]
    Absent(String),
    /// Memory of the device or memory that it can reach is used up.
    #[error("{device}: no memory for {bytes} bytes")]
    Memory {
        /// Name of the device.
        device: String,
        /// What was asked for.
        bytes: usize,
    },
    /// Anything else. What the device holds may be lost.
    #[error("{device}: {operation}: {reason}")]
    Failed {
        /// Name of the device.
        device: String,
        /// What was asked for.
        operation: &'static str,
        /// What the driver says.
        reason: String,
    },
}

/// A kernel: it decodes strips of parts of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    /// Copies bytes.
    Raw,
    /// Split elements.
    Split,
    /// Integers in the tensor's bytes.
    Units,
    /// Quantized elements.
    Quantized,
    /// Quantized elements with a prediction added.
    Predicted,
    /// What starts from a base and is bit-exact.
    Based,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Raw, Self::Split, Self::Units, Self::Quantized, Self::Predicted, Self::Based];

    /// What it is called in the PTX.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "mcwcfs_decode_raw",
            Self::Split => "mcwcfs_decode_split",
            Self::Units => "mcwcfs_decode_units",
            Self::Quantized => "mcwcfs_decode_quantized",
            Self::Predicted => "mcwcfs_decode_predicted",
            Self::Based => "mcwcfs_decode_based",
        }
    }
}

/// Strips to decode: their descriptions and where to say how that went, one after another on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Decodes them.
    pub kernel: Kernel,
    /// Address of the first description.
    pub strips: u64,
    /// How many.
    pub count: u32,
    /// Address of the first status.
    pub statuses: u64,
}

/// A device: CUDA's, or the one that tests emulate. Copies and launches given to one stream happen in their order; those of
/// different streams at the same time.
///
/// Addresses are the device's and mean nothing to the host. All methods may be called from any thread.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Name for logs.
    fn name(&self) -> &str;

    /// Memory that nobody uses, in bytes.
    fn free_bytes(&self) -> Result<u64, DeviceError>;

    /// Memory of the device, on a multiple of 256.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back.
    ///
    /// # Safety
    /// The address is one that [`Self::allocate`] gave for as many bytes, and nothing uses it any more.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Zeroed memory of the host that the device copies from and to by itself, on a multiple of 256.
    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError>;

    /// Gives memory back.
    ///
    /// # Safety
    /// The pointer is one that [`Self::allocate_pinned`] gave for as many bytes, and nothing uses it any more.
    unsafe fn free_pinned(&self, pointer: NonNull<u8>, bytes: usize);

    /// A new stream.
    fn new_stream(&self) -> Result<usize, DeviceError>;

    /// Ends a stream.
    ///
    /// # Safety
    /// It is one that [`Self::new_stream`] gave, and nobody uses it any more.
    unsafe fn end_stream(&self, stream: usize);

    /// Copies to the device, some time before [`Self::synchronize`] returns.
    ///
    /// # Safety
    /// Both lie in memory of this device's, and nobody changes them until then.
    unsafe fn upload(&self, stream: usize, to: u64, from: &[u8]) -> Result<(), DeviceError>;

    /// Copies from the device, some time before [`Self::synchronize`] returns.
    ///
    /// # Safety
    /// Both lie in memory of this device's, and nobody changes or reads them until then.
    unsafe fn download(&self, stream: usize, to: &mut [u8], from: u64) -> Result<(), DeviceError>;

    /// Decodes strips, some time before [`Self::synchronize`] returns.
    ///
    /// # Safety
    /// What the descriptions say is so, and all that they point to is memory of this device's until then.
    unsafe fn launch(&self, stream: usize, launch: Launch) -> Result<(), DeviceError>;

    /// Waits until all that was given to a stream is done.
    fn synchronize(&self, stream: usize) -> Result<(), DeviceError>;
}
