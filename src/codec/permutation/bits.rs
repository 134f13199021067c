//! Numbers of a given width in bits, lowest bit first.

use super::PermutationError;

/// Bits of a fixed-width entry below `count`.
pub(super) fn width(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

/// Appends numbers bit by bit, lowest first.
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    /// Bits used of the last byte.
    used: u32,
}

impl BitWriter {
    /// Appends to whole bytes.
    pub(super) fn after(bytes: Vec<u8>) -> Self {
        Self { bytes, used: 8 }
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    pub(super) fn write(&mut self, value: u32, width: u32) {
        for bit in 0..width {
            if self.used == 8 {
                self.bytes.push(0);
                self.used = 0;
            }
            let last = self.bytes.last_mut().expect("starts with the coding's byte");
            *last |= ((value >> bit & 1) as u8) << self.used;
            self.used += 1;
        }
    }
}

/// Reads what [`BitWriter`] wrote.
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub(super) fn read(&mut self, width: u32) -> Result<u32, PermutationError> {
        let mut value = 0;
        for bit in 0..width {
            let Some(byte) = self.bytes.get(self.position / 8) else {
                return Err(PermutationError::Truncated { field: "entries", needed: 1, left: 0 });
            };
            value |= u32::from(byte >> (self.position % 8) & 1) << bit;
            self.position += 1;
        }
        Ok(value)
    }

    /// Reads `count` numbers, once there are bits for all of them.
    pub(super) fn read_all(&mut self, count: u32, width: u32) -> Result<Vec<u32>, PermutationError> {
        let bits = u64::from(count) * u64::from(width);
        let left = (self.bytes.len() * 8 - self.position) as u64;
        if bits > left {
            return Err(PermutationError::wrong_length("entries", bits.div_ceil(8) as usize, left as usize / 8));
        }
        (0..count).map(|_| self.read(width)).collect()
    }

    /// Only zero bits of the last byte are left.
    pub(super) fn finish(mut self) -> Result<(), PermutationError> {
        let left = self.bytes.len() * 8 - self.position;
        let padding = if left < 8 { self.read(left as u32)? } else { 1 };
        if padding != 0 {
            let found = left as u64;
            return Err(PermutationError::Malformed { field: "bits after the last entry", found, expected: "zeros" });
        }
        Ok(())
    }
}
