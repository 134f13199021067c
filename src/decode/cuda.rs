//! Decoding on a CUDA device: one warp per strip, any strips of any parts in one launch.
//!
//! The kernel is C++ (`cuda/kernel`), checked in as source and as PTX side by side, so that neither building nor running
//! needs a toolkit. The driver is asked for when a process wants it, and everything above [`device::Device`] works the same on
//! one that is emulated, as tests do: the kernel's source runs on a CPU there, lane by lane.
//!
//! Checksums and headers are looked at here, before a launch. A part of a kind that the kernel does not know, a call that
//! does not fit, and everything once the device has failed are decoded by the CPU engine: no read is lost.

pub mod batch;
mod description;
pub mod device;
mod driver;
mod engine;
mod memory;
mod slots;

#[cfg(test)]
mod tests;

pub use driver::CudaDevice;
pub use engine::CudaEngine;
pub use memory::{DeviceMemory, PinnedMemory, Stream};

/// What `--gpu-memory` is where nobody says otherwise.
pub const DEFAULT_GPU_MEMORY_BYTES: u64 = 1 << 30;

/// The kernels as any driver since CUDA 10 compiles them for any device from sm_70 on.
pub const PTX: &str = include_str!("cuda/kernel/decode.ptx");
