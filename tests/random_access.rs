//! How little is decoded for the first byte of a row: one strip, or where a tensor is predicted, the tensors below it.

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use common::Random;
use common::archives::RECIPES;
use common::random_archives::write_random_archive;
use mcwcfs::archive::{Archive, PartAddress};
use mcwcfs::decode::PreparedPart;
use mcwcfs::materialize::{MaterializeOptions, Materializer, prepare_record};

/// What a byte was read from, and how much was decoded for it.
struct Read {
    strips: usize,
    /// Tensors from this one down to its keyframe; 0 if it is not predicted and nothing is predicted from it.
    chain: usize,
    decoded: u64,
}

/// Reads the first byte of a few rows of every coded tensor, each from a cold start.
fn first_bytes_of_rows(archive: &Arc<Archive>, random: &mut Random) -> Vec<Read> {
    let mut reads = Vec::new();
    for (number, file) in archive.files().iter().enumerate() {
        for (ordinal, tensor) in file.tensors.iter().enumerate() {
            let address = archive.address(number, ordinal);
            let parts = prepare_record(archive, address.record).expect("a sound record");
            let part = &parts[address.part as usize];
            let Some(&rows @ 1..) = tensor.shape.first() else { continue };
            if tensor.length_bytes == 0 {
                continue;
            }
            for _ in 0..3 {
                let row = random.below(rows as usize) as u64;
                let offset = file.header.len() as u64 + tensor.offset_bytes + row * (tensor.length_bytes / rows);
                let cold =
                    Materializer::new(MaterializeOptions { cache_bytes: 1 << 26, ..MaterializeOptions::default() });
                let read = cold.read(archive, number, offset, &mut [0]);
                assert_eq!(read.unwrap_or_else(|error| panic!("{}: {error}", tensor.name)), 1);
                let chain = tensors_of_chain(archive, address, part);
                reads.push(Read { strips: part.strips(), chain, decoded: cold.cache_stats().misses });
            }
        }
    }
    reads
}

fn tensors_of_chain(archive: &Archive, address: PartAddress, part: &PreparedPart) -> usize {
    if part.prediction().is_none() && !archive.is_referenced(address.record) {
        return 0;
    }
    let mut chain = HashSet::new();
    let mut left = vec![(address.record, address.part)];
    while let Some((record, part)) = left.pop() {
        if !chain.insert((record, part)) {
            continue;
        }
        let parts = prepare_record(archive, record).expect("a sound record");
        if let Some(prediction) = parts[part as usize].prediction() {
            let below = |record| archive.record(record).reference.expect("a predicted record has one");
            left.push((below(record), prediction.reference_part));
            left.extend(prediction.second_part.map(|second| (below(below(record)), second)));
        }
    }
    chain.len()
}

#[test]
fn the_first_byte_of_a_row_decodes_one_strip_or_the_chain_below_it() {
    let work = tempfile::tempdir().expect("a directory");
    let mut random = Random::new(3);
    let mut archives: Vec<_> = RECIPES.iter().map(|recipe| recipe.pack(work.path())).collect();
    for seed in 0..12 {
        let path = work.path().join(format!("random-{seed}.mcwc"));
        write_random_archive(seed, &path);
        archives.push(path);
    }
    let (mut alone, mut chains) = (0, HashSet::new());
    for path in archives {
        let archive = Arc::new(Archive::open(&path).expect("an archive"));
        for Read { strips, chain, decoded } in first_bytes_of_rows(&archive, &mut random) {
            assert!(chain as u32 <= archive.index().keyframe_interval, "{}: a chain of {chain}", path.display());
            assert_eq!(decoded, chain.max(1) as u64, "{}: {strips} strips, a chain of {chain}", path.display());
            alone += usize::from(strips > 1 && chain == 0);
            chains.insert(chain);
        }
    }
    assert!(alone > 10 && chains.len() > 2, "{alone} reads of parts of several strips, chains of {chains:?} tensors");
}
