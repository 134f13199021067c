//! Copying an archive to a device: chunks of strips, each described and checked while the one before is on its way.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::{Chunk, DeviceTensor, GpuError, Loaded};
use crate::archive::{Archive, PartAddress};
use crate::decode::PreparedPart;
use crate::decode::cuda::batch::{Batch, Launches, part_bytes, room_bytes, strip_bytes, supports};
use crate::decode::cuda::device::{Device, DeviceError};
use crate::decode::cuda::{DeviceMemory, PinnedMemory, Stream};
use crate::decode::prepared::PartKind;
use crate::materialize::{MaterializeOptions, Materializer, decode_error, prepare_record};

/// What is copied at once. Two of these are page-locked on the host.
const CHUNK_BYTES: usize = 64 << 20;

/// Tensors begin on multiples of this.
const TENSOR_ALIGNMENT: u64 = 256;

/// Copies an archive to a device. A tensor is given more room, filled with zeros, where `least_bytes` asks for it.
pub(super) fn load(
    device: &Arc<dyn Device>,
    archive: &Arc<Archive>,
    least_bytes: &dyn Fn(PartAddress) -> u64,
) -> Result<Loaded, GpuError> {
    let records = (0..archive.index().records.len() as u32).map(|record| prepare_record(archive, record));
    let records: Vec<Vec<PreparedPart>> = records.collect::<Result<_, _>>()?;
    let bases = load_bases(device, archive, &records)?;
    let (tensors, bytes) = place_tensors(archive, least_bytes);
    let memory = DeviceMemory::new(device, usize::try_from(bytes).unwrap_or(usize::MAX))?;
    let tensors: Vec<Vec<DeviceTensor>> = tensors
        .into_iter()
        .map(|file| {
            file.into_iter()
                .map(|tensor| DeviceTensor { address: memory.address() + tensor.address, ..tensor })
                .collect()
        })
        .collect();
    let mut loader = Loader::new(device, archive, &records, &bases, &tensors)?;
    loader.fill_with_zeros(least_bytes)?;
    loader.load_what_the_cpu_decodes()?;
    loader.load_levels()?;
    let chunks = loader.finish()?;
    let (device, archive) = (Arc::clone(device), Arc::clone(archive));
    Ok(Loaded { device, archive, _bases: bases, tensors, chunks, _memory: memory })
}

/// Loads and decodes the bases of an archive.
fn load_bases(
    device: &Arc<dyn Device>,
    archive: &Archive,
    records: &[Vec<PreparedPart>],
) -> Result<Vec<Loaded>, GpuError> {
    // By base: how long a tensor has to be for what starts from it. What it does not have starts from zero.
    let mut lengths: HashMap<(u64, PartAddress), u64> = HashMap::new();
    for part in records.iter().flatten() {
        if let Some((base, address)) = part.base().and_then(|reference| archive.base_tensor(reference)) {
            let length = lengths.entry((base.instance(), address)).or_default();
            *length = (*length).max(part.length_bytes());
        }
    }
    let load_base = |base: &Arc<Archive>| {
        let loaded = load(device, base, &|address| lengths.get(&(base.instance(), address)).copied().unwrap_or(0))?;
        loaded.decode()?;
        Ok(loaded)
    };
    archive.bases().iter().map(load_base).collect()
}

/// Where tensors lie behind one another, and the length of all.
fn place_tensors(archive: &Archive, least_bytes: &dyn Fn(PartAddress) -> u64) -> (Vec<Vec<DeviceTensor>>, u64) {
    let mut end = 0_u64;
    let mut place = |file: usize, tensor: usize, length_bytes: u64| {
        let address = end;
        let room = length_bytes.max(least_bytes(archive.address(file, tensor)));
        end = (end + room).next_multiple_of(TENSOR_ALIGNMENT);
        DeviceTensor { address, length_bytes }
    };
    let files = archive.files().iter().enumerate().map(|(file, entry)| {
        let tensors = entry.tensors.iter().enumerate();
        tensors.map(|(tensor, info)| place(file, tensor, info.length_bytes)).collect()
    });
    (files.collect(), end)
}

/// Whether a part is decoded by the CPU: there is no kernel for its kind.
fn is_decoded_here(part: &PreparedPart) -> bool {
    !supports(part) && !matches!(part.kind(), PartKind::Raw)
}

/// An archive on its way.
struct Loader<'a> {
    device: &'a Arc<dyn Device>,
    archive: &'a Archive,
    records: &'a [Vec<PreparedPart>],
    bases: &'a [Loaded],
    tensors: &'a [Vec<DeviceTensor>],
    /// Taken in turn, so that one is filled while another is copied.
    ways: [Way; 2],
    next_way: usize,
    chunks: Vec<Chunk>,
}

/// Where a chunk is put together, and what copies it.
struct Way {
    /// Before the memory, so that it is dropped first.
    stream: Stream,
    staging: PinnedMemory,
}

impl<'a> Loader<'a> {
    fn new(
        device: &'a Arc<dyn Device>,
        archive: &'a Archive,
        records: &'a [Vec<PreparedPart>],
        bases: &'a [Loaded],
        tensors: &'a [Vec<DeviceTensor>],
    ) -> Result<Self, DeviceError> {
        // No more than there is to copy: small archives are many.
        let longest = usize::try_from(archive.stored_bytes()).map_or(CHUNK_BYTES, |bytes| (2 * bytes).min(CHUNK_BYTES));
        let way = || Ok(Way { stream: Stream::new(device)?, staging: PinnedMemory::new(device, longest)? });
        let ways = [way()?, way()?];
        Ok(Self { device, archive, records, bases, tensors, ways, next_way: 0, chunks: Vec::new() })
    }

    fn part(&self, address: PartAddress) -> &'a PreparedPart {
        &self.records[address.record as usize][address.part as usize]
    }

    fn tensor(&self, address: PartAddress) -> DeviceTensor {
        let entry = &self.archive.record(address.record).parts[address.part as usize];
        self.tensors[entry.file as usize][entry.tensor as usize]
    }

    /// The address of element 0 of what a part is predicted from.
    fn reference(&self, address: PartAddress) -> u64 {
        let part = self.part(address);
        if let Some((base, place)) = part.base().and_then(|reference| self.archive.base_tensor(reference)) {
            let is_it = |loaded: &&Loaded| loaded.archive.instance() == base.instance();
            let loaded = self.bases.iter().find(is_it).expect("all bases are loaded");
            let entry = &base.record(place.record).parts[place.part as usize];
            return loaded.tensor(entry.file as usize, entry.tensor as usize).address;
        }
        let Some(prediction) = part.prediction() else { return 0 };
        let record = self.archive.record(address.record).reference.expect("checked when it was prepared");
        self.tensor(PartAddress { record, part: prediction.reference_part }).address
    }

    /// Parts by how many have to be decoded before them: those of their chain below them.
    fn levels(&self) -> Vec<Vec<PartAddress>> {
        let mut level_of: HashMap<PartAddress, usize> = HashMap::new();
        let mut levels: Vec<Vec<PartAddress>> = Vec::new();
        for (record, parts) in self.records.iter().enumerate() {
            let below = self.archive.record(record as u32).reference;
            for (ordinal, part) in parts.iter().enumerate() {
                let address = PartAddress { record: record as u32, part: ordinal as u32 };
                if is_decoded_here(part) {
                    level_of.insert(address, 0); // there before all others
                    continue;
                }
                let level = part.prediction().zip(below).map_or(0, |(prediction, record)| {
                    // References come before what refers to them.
                    1 + level_of[&PartAddress { record, part: prediction.reference_part }]
                });
                level_of.insert(address, level);
                if levels.len() <= level {
                    levels.resize_with(level + 1, Vec::new);
                }
                levels[level].push(address);
            }
        }
        levels
    }

    /// What a tensor has room for beyond its end is zero.
    fn fill_with_zeros(&mut self, least_bytes: &dyn Fn(PartAddress) -> u64) -> Result<(), DeviceError> {
        for (file, tensors) in self.tensors.iter().enumerate() {
            for (tensor, &DeviceTensor { address, length_bytes }) in tensors.iter().enumerate() {
                let end = address + least_bytes(self.archive.address(file, tensor));
                let mut at = address + length_bytes;
                let Way { stream, staging } = &mut self.ways[0];
                while at < end {
                    let bytes = (staging.len() as u64).min(end - at);
                    // SAFETY: the staging memory is fresh and stays so until the stream is done with it below; the
                    // tensors' memory is the caller's until the loader is gone.
                    unsafe { self.device.upload(stream.number(), at, &staging[..bytes as usize])? };
                    at += bytes;
                }
            }
        }
        self.ways[0].stream.synchronize()
    }

    /// Decodes parts of kinds that no kernel knows on the CPU, and copies what they are.
    fn load_what_the_cpu_decodes(&mut self) -> Result<(), GpuError> {
        let materializer =
            Materializer::new(MaterializeOptions { cache_bytes: 1 << 30, ..MaterializeOptions::default() });
        for (file, entry) in self.archive.files().iter().enumerate() {
            for (tensor, info) in entry.tensors.iter().enumerate() {
                let address = self.archive.address(file, tensor);
                if !is_decoded_here(self.part(address)) {
                    continue;
                }
                let mut bytes = PinnedMemory::new(self.device, info.length_bytes as usize)?;
                let bytes = &mut bytes[..info.length_bytes as usize];
                materializer.read(self.archive, file, entry.header.len() as u64 + info.offset_bytes, bytes)?;
                let stream = &self.ways[0].stream;
                // SAFETY: the memory is left alone until the stream is done with it, which is waited for whatever happens; the
                // tensors' memory is the caller's until the loader is gone.
                let given = unsafe { self.device.upload(stream.number(), self.tensors[file][tensor].address, bytes) };
                stream.synchronize().and(given)?;
            }
        }
        Ok(())
    }

    fn load_levels(&mut self) -> Result<(), GpuError> {
        for parts in self.levels() {
            let strips = parts.iter().flat_map(|&part| (0..self.part(part).strips()).map(move |strip| (part, strip)));
            let strips: Vec<(PartAddress, usize)> = strips.collect();
            let mut rest = &strips[..];
            while !rest.is_empty() {
                let count = self.how_many_fit(rest);
                self.load_chunk(&rest[..count])?;
                rest = &rest[count..];
            }
        }
        Ok(())
    }

    /// How many of the first strips make a chunk, one at least.
    fn how_many_fit(&self, strips: &[(PartAddress, usize)]) -> usize {
        let mut bytes = 0;
        let mut fit = 0;
        for of_part in strips.chunk_by(|a, b| a.0 == b.0) {
            let part = self.part(of_part[0].0);
            bytes += part_bytes(part, of_part[0].1..of_part[of_part.len() - 1].1 + 1);
            for &(_, strip) in of_part {
                bytes += strip_bytes(part, strip);
                if bytes > CHUNK_BYTES && fit > 0 {
                    return fit;
                }
                fit += 1;
            }
        }
        fit
    }

    /// Describes strips, checks and copies them.
    fn load_chunk(&mut self, strips: &[(PartAddress, usize)]) -> Result<(), GpuError> {
        let of_parts: Vec<_> = strips.chunk_by(|a, b| a.0 == b.0).collect();
        let range = |of_part: &[(PartAddress, usize)]| of_part[0].1..of_part[of_part.len() - 1].1 + 1;
        let bytes_of_part = |of_part: &&[(PartAddress, usize)]| {
            let part = self.part(of_part[0].0);
            let strips = range(of_part);
            let rooms: usize = strips.clone().map(|strip| room_bytes(part, strip)).sum();
            (part_bytes(part, strips.clone()) + strips.map(|strip| strip_bytes(part, strip)).sum::<usize>(), rooms)
        };
        let (batch_bytes, rooms) = of_parts.iter().map(bytes_of_part).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let batch_bytes = batch_bytes.next_multiple_of(TENSOR_ALIGNMENT as usize);
        let memory = DeviceMemory::new(self.device, batch_bytes + rooms)?;

        let sources: Vec<(u64, u64)> =
            of_parts.iter().map(|of_part| (self.tensor(of_part[0].0).address, self.reference(of_part[0].0))).collect();
        let (archive, records) = (self.archive, self.records);
        let way = &mut self.ways[self.next_way];
        self.next_way = 1 - self.next_way;
        way.stream.synchronize()?; // with the chunk before last
        if way.staging.len() < batch_bytes {
            way.staging = PinnedMemory::new(self.device, batch_bytes)?; // one strip or part of unusual length
        }
        let mut batch = Batch::new(&mut way.staging, memory.address(), memory.address() + batch_bytes as u64);
        for (of_part, (out, reference)) in of_parts.into_iter().zip(sources) {
            let address = of_part[0].0;
            let part = &records[address.record as usize][address.part as usize];
            let numbers = range(of_part);
            let first_byte = part.strip_range(numbers.start).start;
            let mut stored = vec![0; (part.strip_range(numbers.end - 1).end - first_byte) as usize];
            archive.read_body(address, first_byte, &mut stored)?;
            let bytes_of = |strip: usize| {
                let range = part.strip_range(strip);
                &stored[(range.start - first_byte) as usize..(range.end - first_byte) as usize]
            };
            let checked =
                numbers.clone().into_par_iter().try_for_each(|strip| part.check_strip(strip, bytes_of(strip)));
            checked.map_err(|error| decode_error(archive, address, error))?;
            let placed = batch.add_part(part, numbers.clone());
            for strip in numbers {
                let out = out + part.output_range(strip..strip + 1).start;
                batch.add_strip(placed, (part, strip), bytes_of(strip), out, reference, (address, strip));
            }
        }
        let Launches { bytes, launches, statuses, keys } = batch.finish();
        // SAFETY: the staging memory is left alone until its stream is done, which is waited for before it is used again and
        // when it is dropped; the device's memory is the chunk's.
        unsafe { self.device.upload(way.stream.number(), memory.address(), &way.staging[..bytes])? };
        self.chunks.push(Chunk { launches, statuses, strips: keys, _memory: memory });
        Ok(())
    }

    /// Waits for all that is on its way.
    fn finish(self) -> Result<Vec<Chunk>, DeviceError> {
        self.ways.iter().try_for_each(|way| way.stream.synchronize())?;
        Ok(self.chunks)
    }
}
