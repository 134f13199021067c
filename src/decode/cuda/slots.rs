//! Places where a call decodes: a stream and the memory that goes with it. There are several, so that one call's bytes are on
//! their way while another's strips decode.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::device::{Device, DeviceError};
use super::memory::{DeviceMemory, PinnedMemory, Stream};

/// Memory grows to multiples of this, so that it does not grow often.
const GROWTH_BYTES: usize = 1 << 20;

/// A stream with memory on both sides of it.
#[derive(Debug)]
pub(super) struct Slot {
    device: Arc<dyn Device>,
    most_bytes: usize,
    /// Before the memory, so that it is dropped first.
    pub stream: Stream,
    memory: Option<DeviceMemory>,
    staging: Option<PinnedMemory>,
}

impl Slot {
    fn new(device: &Arc<dyn Device>, most_bytes: usize) -> Result<Self, DeviceError> {
        let stream = Stream::new(device)?;
        Ok(Self { device: Arc::clone(device), most_bytes, stream, memory: None, staging: None })
    }

    /// Memory of the device, so many bytes at least, and of the host, alike. What they held is lost.
    pub fn memory(
        &mut self,
        device_bytes: usize,
        staging_bytes: usize,
    ) -> Result<(&Stream, &DeviceMemory, &mut PinnedMemory), DeviceError> {
        let grown = |bytes: usize| bytes.next_multiple_of(GROWTH_BYTES).min(self.most_bytes.max(bytes));
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < device_bytes) {
            self.memory = None; // before there is more
            self.memory = Some(DeviceMemory::new(&self.device, grown(device_bytes))?);
        }
        if self.staging.as_ref().is_none_or(|staging| staging.len() < staging_bytes) {
            self.staging = None;
            self.staging = Some(PinnedMemory::new(&self.device, grown(staging_bytes))?);
        }
        let (Some(memory), Some(staging)) = (&self.memory, &mut self.staging) else {
            unreachable!("both have just been made")
        };
        Ok((&self.stream, memory, staging))
    }
}

/// Slots that nobody has.
#[derive(Debug)]
pub(super) struct Slots {
    free: Mutex<Vec<Slot>>,
    given_back: Condvar,
}

/// A slot, until it is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    slots: &'a Slots,
    slot: Option<Slot>,
}

impl Slots {
    /// So many slots, with no memory yet and `most_bytes` at most each.
    pub fn new(device: &Arc<dyn Device>, count: usize, most_bytes: usize) -> Result<Self, DeviceError> {
        let free = (0..count).map(|_| Slot::new(device, most_bytes)).collect::<Result<_, _>>()?;
        Ok(Self { free: Mutex::new(free), given_back: Condvar::new() })
    }

    /// A slot; waits for one. Who has one waits for nobody but the device.
    pub fn take(&self) -> Held<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // The one given back last: it has memory.
            if let Some(slot) = free.pop() {
                return Held { slots: self, slot: Some(slot) };
            }
            free = self.given_back.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Deref for Held<'_> {
    type Target = Slot;

    fn deref(&self) -> &Slot {
        self.slot.as_ref().expect("held until it is dropped")
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Slot {
        self.slot.as_mut().expect("held until it is dropped")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let slot = self.slot.take().expect("held until it is dropped");
        self.slots.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        self.slots.given_back.notify_one();
    }
}
