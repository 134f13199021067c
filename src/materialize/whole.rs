//! Parts that are decoded whole: what is predicted, and what others are predicted from.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::{MaterializeError, Materializer, Purpose, UnitKey, bytes_of, zeroed};
use crate::archive::{Archive, PartAddress};
use crate::decode::PreparedPart;
use crate::metrics::METRICS;

/// Tensors held while one is decoded that is predicted from two layers: itself, the two, the two side by side, and one that
/// the lower one is decoded from.
const TENSORS_OF_TWO_LAYERS: u64 = 6;

impl Materializer {
    /// Fills `out` with the bytes of a part from `offset` on.
    pub(super) fn read_whole(
        &self,
        purpose: Purpose,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let mut copy = |whole: &[u8]| out.copy_from_slice(&whole[offset as usize..][..out.len()]);
        if let Some(whole) = self.whole_if_known(archive, address) {
            copy(&whole);
            return Ok(());
        }
        let _memory = match purpose {
            Purpose::Reading(_) => {
                let needed = self.memory_for_whole(part);
                self.check_memory(archive, address, needed)?;
                Some(self.take_memory(needed))
            }
            Purpose::Decoding => None,
        };
        copy(&self.whole(archive, address)?);
        Ok(())
    }

    /// A whole decoded tensor if the cache has it.
    pub(super) fn whole_if_known(&self, archive: &Archive, address: PartAddress) -> Option<Arc<[u8]>> {
        self.cache.get(&key_of_whole(archive, address))
    }

    /// Decodes a part into the cache, unless it would push out what others need.
    pub(super) fn decode_whole_ahead(
        &self,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
    ) -> Result<(), MaterializeError> {
        self.processors.wait_until_idle();
        let is_small_enough = part.length_bytes() <= self.cache.stats().budget_bytes / 4;
        if !is_small_enough || self.cache.knows(&[key_of_whole(archive, address)]) == [true] {
            return Ok(());
        }
        let needed = self.memory_for_whole(part);
        if needed > self.memory.total() {
            return Ok(()); // for that, others must make room: whoever reads it asks them to
        }
        let _memory = self.take_memory(needed);
        self.whole(archive, address)?;
        METRICS.decoded_ahead_bytes.add(part.length_bytes());
        Ok(())
    }

    /// A part and its references, all of which are held while it is decoded, and what they are decoded from. All parts of a
    /// chain are of one length. Never more than two of them are held, or three where predictors look at two layers and as many
    /// again where the two lie side by side.
    pub(super) fn memory_for_whole(&self, part: &PreparedPart) -> u64 {
        let tensors = match part.prediction() {
            Some(prediction) if prediction.second_part.is_some() => TENSORS_OF_TWO_LAYERS,
            Some(_) => 2,
            None => 1 + u64::from(part.base().is_some()),
        };
        self.memory_for(part.length_bytes(), tensors)
    }

    fn memory_for(&self, length_bytes: u64, tensors: u64) -> u64 {
        let held = length_bytes.saturating_mul(tensors);
        held.saturating_add(held.min(self.processors.total().saturating_mul(self.together_bytes())))
    }

    fn check_memory(&self, archive: &Archive, address: PartAddress, needed_bytes: u64) -> Result<(), MaterializeError> {
        let available_bytes = self.memory.total().saturating_add(self.cache.stats().budget_bytes);
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        Err(MaterializeError::TooLarge {
            archive: archive.path().display().to_string(),
            tensor: archive.tensor(address).name.clone(),
            needed_bytes,
            available_bytes,
        })
    }

    /// Whether there is memory for every tensor of `archive` and its bases that may have to be decoded whole.
    ///
    /// # Errors
    /// [`MaterializeError::TooLarge`] for the first for which there is not.
    pub fn check_fits(&self, archive: &Archive) -> Result<(), MaterializeError> {
        for base in archive.bases() {
            self.check_fits(base)?;
        }
        if !archive.is_lossy() {
            return Ok(()); // decoded strip by strip
        }
        let looks_at_two_layers = archive.networks().iter().any(|network| network.contexts() == 2);
        for (file, entry) in archive.files().iter().enumerate() {
            for (tensor, info) in entry.tensors.iter().enumerate() {
                let address = archive.address(file, tensor);
                let is_predicted = archive.record(address.record).reference.is_some();
                if is_predicted || archive.is_referenced(address.record) {
                    let tensors = match (is_predicted, looks_at_two_layers) {
                        (false, _) => 1,
                        (true, false) => 2,
                        (true, true) => TENSORS_OF_TWO_LAYERS,
                    };
                    self.check_memory(archive, address, self.memory_for(info.length_bytes, tensors))?;
                }
            }
        }
        Ok(())
    }

    /// A whole decoded tensor, through the cache; its reference first (Algorithm 1's context buffer). The caller holds the
    /// memory for it.
    pub(super) fn whole(&self, archive: &Archive, address: PartAddress) -> Result<Arc<[u8]>, MaterializeError> {
        self.cache.get_or_try_insert(key_of_whole(archive, address), || {
            let record = self.prepared.get(archive, address.record)?;
            let part = &record[address.part as usize];
            let reference = match part.prediction() {
                Some(prediction) => {
                    let below = |record: u32| archive.record(record).reference.expect("checked when it was prepared");
                    let reference = below(address.record);
                    let nearest =
                        self.whole(archive, PartAddress { record: reference, part: prediction.reference_part })?;
                    match prediction.second_part {
                        None => Some(nearest),
                        Some(part) => {
                            let second = self.whole(archive, PartAddress { record: below(reference), part })?;
                            Some(Arc::from([&*nearest, &*second].concat()))
                        }
                    }
                }
                None => None,
            };
            let mut decoded = zeroed(part.length_bytes() as usize);
            self.decode_in_parallel(archive, address, part, reference.as_deref(), bytes_of(&mut decoded))?;
            Ok(decoded)
        })
    }

    /// Decodes a part on as many threads as processors have nothing else to do, and one at least.
    ///
    /// Threads of its own, not a pool's: a pool's thread that waits for a task takes up another one meanwhile, which may
    /// ask for the very tensor that the first is decoding.
    fn decode_in_parallel(
        &self,
        archive: &Archive,
        address: PartAddress,
        part: &PreparedPart,
        reference: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), MaterializeError> {
        let strip_bytes = part.full_strip_output_bytes() as usize;
        let together = self.strips_together(part);
        let groups = out.len().div_ceil(together * strip_bytes) as u64;
        let groups_left = Mutex::new(out.chunks_mut(together * strip_bytes).enumerate());
        let work = || {
            loop {
                let next = groups_left.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((group, out)) = next else { return Ok(()) };
                let outs = out.chunks_mut(strip_bytes).collect();
                self.decode(archive, address, part, group * together, reference, outs)?;
            }
        };
        let helpers = self.processors.take_what_is_free(groups).amount().saturating_sub(1);
        thread::scope(|scope| {
            // A thread that the system does not grant is done without.
            let helpers: Vec<_> = (0..helpers)
                .filter_map(|_| thread::Builder::new().name("decode".to_owned()).spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            let joined = helpers.into_iter().map(|helper| match helper.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.fold(own, Result::and)
        })
    }
}

fn key_of_whole(archive: &Archive, address: PartAddress) -> UnitKey {
    UnitKey { archive: archive.instance(), record: address.record, part: address.part, strip: None }
}
