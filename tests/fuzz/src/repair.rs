//! A mutator that knows where the checksums of an archive are: it changes what they cover and makes them right again.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use libfuzzer_sys::fuzzer_mutate;
use mcwcfs::archive::{self, Archive};
use mcwcfs::format::index::Index;
use mcwcfs::format::preamble::{PREAMBLE_BYTES, Preamble};
use mcwcfs::materialize::prepare_record;

/// More than an index of the corpus ever inflates to.
const INFLATED_BYTES: u64 = 1 << 20;
const BODY_START: usize = PREAMBLE_BYTES as usize;

/// libFuzzer's custom mutator: changes `data[..size]` in place, within `max_size`, and returns the new size.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let Some((features, fields, records)) = take_apart(&data[..size]) else {
        return fuzzer_mutate(data, size, max_size);
    };
    // One change in eight is left as it is: the checks themselves are to be tried, too.
    let archive = match seed % 8 {
        0 => return fuzzer_mutate(data, size, max_size),
        1..=3 => put_together(features, &grown(&fields, max_size), &records),
        _ => put_together(features, &fields, &grown(&records, max_size)),
    };
    let archive = if seed & 8 == 0 { repair(archive) } else { archive };
    if archive.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..archive.len()].copy_from_slice(&archive);
    archive.len()
}

/// One of libFuzzer's own mutations of `bytes`.
fn grown(bytes: &[u8], max_size: usize) -> Vec<u8> {
    let mut buffer = vec![0; max_size.max(bytes.len())];
    buffer[..bytes.len()].copy_from_slice(bytes);
    let limit = buffer.len();
    let length = fuzzer_mutate(&mut buffer, bytes.len(), limit);
    buffer.truncate(length);
    buffer
}

/// The required features, the index before deflation, and the records.
fn take_apart(bytes: &[u8]) -> Option<(u64, Vec<u8>, Vec<u8>)> {
    let preamble = Preamble::parse(bytes.get(..BODY_START)?, bytes.len() as u64).ok()?;
    let (records, stored) = bytes[BODY_START..].split_at(preamble.index_offset as usize - BODY_START);
    let mut fields = Vec::new();
    DeflateDecoder::new(stored).take(INFLATED_BYTES).read_to_end(&mut fields).ok()?;
    Some((preamble.required_features, fields, records.to_vec()))
}

/// An archive whose preamble fits these parts.
fn put_together(required_features: u64, fields: &[u8], records: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(fields).expect("a vector takes every byte");
    let stored = encoder.finish().expect("a vector takes every byte");
    let index_offset = PREAMBLE_BYTES + records.len() as u64;
    let preamble = Preamble {
        required_features,
        file_bytes: index_offset + stored.len() as u64,
        index_offset,
        index_inflated_bytes: fields.len() as u64,
        index_crc: crc32c::crc32c(&stored),
    };
    [preamble.write().as_slice(), records, &stored].concat()
}

/// Makes lengths and checksums of the records right, as far as the index can be read.
fn repair(bytes: Vec<u8>) -> Vec<u8> {
    let parsed = Preamble::parse(&bytes[..BODY_START], bytes.len() as u64)
        .and_then(|preamble| Ok((Index::parse(&bytes[preamble.index_offset as usize..], &preamble)?, preamble)));
    let Ok((mut index, preamble)) = parsed else { return bytes };
    let mut records = bytes[BODY_START..preamble.index_offset as usize].to_vec();
    let length = index.records.iter().fold(0_u64, |sum, record| sum.saturating_add(record.bytes()));
    if length > INFLATED_BYTES {
        return bytes;
    }
    records.resize(length as usize, 0);
    index.content_id = archive::content_id(index.files.iter().map(|file| file.decoded_sha256));
    let repaired = with_side_checksums(&mut index, &records);
    if let Some(archive) = crate::open(&repaired) {
        repair_strips(&archive, &mut records);
        return with_side_checksums(&mut index, &records);
    }
    repaired
}

fn with_side_checksums(index: &mut Index, records: &[u8]) -> Vec<u8> {
    let mut start = 0;
    for record in &mut index.records {
        record.side_crc = crc32c::crc32c(&records[start..start + record.side_bytes as usize]);
        start += record.bytes() as usize;
    }
    let (preamble, stored) = index.write(PREAMBLE_BYTES + records.len() as u64);
    [preamble.write().as_slice(), records, &stored].concat()
}

/// Writes the right strip checksums into the side information of every record that can be read.
fn repair_strips(archive: &Archive, records: &mut [u8]) {
    let mut start = 0;
    for (ordinal, entry) in archive.index().records.iter().enumerate() {
        let ordinal = ordinal as u32;
        let (side_range, mut body) = (start..start + entry.side_bytes as usize, start + entry.side_bytes as usize);
        start += entry.bytes() as usize;
        let (Ok(mut side), Ok(parts)) = (archive.side_information(ordinal), prepare_record(archive, ordinal)) else {
            continue;
        };
        for ((part, header), listed) in parts.iter().zip(&mut side.parts).zip(&entry.parts) {
            for (strip, crc) in header.strip_crcs.iter_mut().enumerate() {
                let range = part.strip_range(strip);
                *crc = crc32c::crc32c(&records[body + range.start as usize..body + range.end as usize]);
            }
            body += listed.body_bytes as usize;
        }
        let written = side.write();
        if written.len() == side_range.len() {
            records[side_range].copy_from_slice(&written);
        }
    }
}
