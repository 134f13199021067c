//! What is borrowed of a device and given back when it is dropped.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use super::device::{Device, DeviceError};

/// Memory of a device.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// So many bytes, one at least. What they are is not said.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let bytes = bytes.max(1);
        let address = device.allocate(bytes)?;
        Ok(Self { device: Arc::clone(device), address, bytes })
    }

    /// Address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: it was allocated in `new`. Whoever gave it to a stream keeps it until that stream is done with it.
        unsafe { self.device.free(self.address, self.bytes) };
    }
}

/// Memory of the host that a device reaches by itself.
#[derive(Debug)]
pub struct PinnedMemory {
    device: Arc<dyn Device>,
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is memory of the process, and owned.
unsafe impl Send for PinnedMemory {}
// SAFETY: shared, it is only read.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// So many bytes, one at least.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let bytes = bytes.max(1);
        let pointer = device.allocate_pinned(bytes)?;
        Ok(Self { device: Arc::clone(device), pointer, bytes })
    }
}

impl Deref for PinnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: so many initialized bytes, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.bytes) }
    }
}

impl DerefMut for PinnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: so many initialized bytes, owned by `self`, which is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: it was allocated in `new`. Whoever gave it to a stream keeps it until that stream is done with it.
        unsafe { self.device.free_pinned(self.pointer, self.bytes) };
    }
}

/// A stream of a device. When it is dropped, all that it was given is done.
#[derive(Debug)]
pub struct Stream {
    device: Arc<dyn Device>,
    number: usize,
}

impl Stream {
    /// A new one.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        Ok(Self { number: device.new_stream()?, device: Arc::clone(device) })
    }

    /// What the device calls it.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Waits until all that was given to it is done.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.synchronize(self.number)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What it was given may use memory that is given back next. An error has been or will be told by another call.
        let _ = self.device.synchronize(self.number);
        // SAFETY: it was made in `new`, and nobody else has its number.
        unsafe { self.device.end_stream(self.number) };
    }
}
