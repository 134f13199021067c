//! Many threads read archives of every kind with hardly any memory: all end, and every byte is the reference decoder's.

mod common;

use std::sync::Arc;
use std::thread;

use common::Random;
use common::random_archives::write_random_archive;
use mcwcfs::archive::Archive;
use mcwcfs::materialize::{EngineChoice, Keeper, MaterializeError, MaterializeOptions, Materializer};

/// The only file of an archive, decoded from first to last byte.
fn decoded(archive: &Archive) -> Vec<u8> {
    let options = MaterializeOptions { cache_bytes: 1 << 30, engine: EngineChoice::Reference, ..Default::default() };
    let mut bytes = vec![0; archive.files()[0].length_bytes as usize];
    Materializer::new(options).read(archive, 0, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn readers_with_hardly_any_memory_all_end_with_the_right_bytes() {
    let directory = tempfile::tempdir().unwrap();
    for seed in 0..12 {
        let path = directory.path().join(format!("{seed}.mcwc"));
        write_random_archive(seed, &path);
        let archive = Arc::new(Archive::open(&path).unwrap());
        let expected = decoded(&archive);
        for (cache_bytes, working_bytes, threads) in
            [(0, 0, 1), (0, 1, 2), (10_000, 100_000, 1), (100_000, 1 << 20, 3), (1 << 30, u64::MAX, 2)]
        {
            let options = MaterializeOptions { cache_bytes, working_bytes, threads, ..Default::default() };
            let materializer = Materializer::new(options);
            thread::scope(|scope| {
                for reader in 0..12 {
                    let (archive, expected, materializer) = (&archive, &expected, &materializer);
                    scope.spawn(move || {
                        let mut random = Random::new(1000 * seed + reader);
                        for _ in 0..6 {
                            let from = random.below(expected.len());
                            let length = random.below(expected.len() - from) + 1;
                            let keeper = if reader % 2 == 0 { Keeper::Cache } else { Keeper::Reader };
                            if reader < 4 {
                                materializer.decode_ahead(keeper, archive, 0, from as u64, length as u64);
                            }
                            if let Some(decoded) = materializer.decoded(archive, 0, from as u64, length) {
                                assert!(*decoded == expected[from..][..length], "seed {seed}: {length} from {from}");
                            }
                            let mut out = vec![0; length];
                            match materializer.read_for(keeper, archive, 0, from as u64, &mut out) {
                                Ok(read) => assert_eq!(read, length),
                                Err(MaterializeError::TooLarge { needed_bytes, .. }) => {
                                    assert!(needed_bytes > working_bytes && cache_bytes <= 10_000);
                                    continue; // said before anything is decoded
                                }
                                Err(error) => panic!("{error}"),
                            }
                            assert!(out == expected[from..][..length], "seed {seed}: {length} bytes from {from}");
                        }
                    });
                }
            });
            assert!(materializer.cache_stats().bytes <= cache_bytes);
        }
    }
}

#[test]
fn what_was_decoded_ahead_is_not_decoded_again() {
    let directory = tempfile::tempdir().unwrap();
    for seed in 0..12 {
        let path = directory.path().join(format!("{seed}.mcwc"));
        write_random_archive(seed, &path);
        let archive = Archive::open(&path).unwrap();
        let expected = decoded(&archive);
        for keeper in [Keeper::Cache, Keeper::Reader] {
            let materializer = Materializer::new(MaterializeOptions { cache_bytes: 1 << 30, ..Default::default() });
            materializer.decode_ahead(keeper, &archive, 0, 0, u64::MAX);
            let (stats, mut out) = (materializer.cache_stats(), vec![0; expected.len()]);
            materializer.read_for(keeper, &archive, 0, 0, &mut out).unwrap();
            assert!(out == expected, "seed {seed}");
            assert_eq!(materializer.cache_stats().misses, stats.misses, "seed {seed}");
            assert_eq!(materializer.cache_stats().duplicate_makes, 0);
            assert!(materializer.cache_stats().hits > stats.hits);
        }
    }
}

#[test]
fn reading_on_the_threads_of_a_pool_ends() {
    use rayon::prelude::*;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("3.mcwc");
    write_random_archive(3, &path);
    let archive = Archive::open(&path).unwrap();
    let expected = decoded(&archive);
    let materializer = Materializer::new(MaterializeOptions { cache_bytes: 1 << 30, ..Default::default() });
    (0..200).into_par_iter().for_each(|reader| {
        let mut random = Random::new(reader);
        let from = random.below(expected.len());
        let mut out = vec![0; expected.len() - from];
        materializer.read(&archive, 0, from as u64, &mut out).unwrap();
        assert!(out == expected[from..]);
    });
}

#[test]
fn a_tensor_that_is_decoded_whole_keeps_within_working_memory_and_cache_or_is_refused() {
    let recipe = common::archives::RECIPES.iter().find(|recipe| recipe.name == "lossy-predicted").expect("a recipe");
    let directory = tempfile::tempdir().unwrap();
    let archive = Archive::open(&recipe.pack(directory.path())).unwrap();
    let expected = decoded(&archive);
    let longest = archive.files()[0].tensors.iter().map(|tensor| tensor.length_bytes).max().unwrap();
    let materializer = |cache_bytes, working_bytes| {
        Materializer::new(MaterializeOptions { cache_bytes, working_bytes, threads: 1, ..Default::default() })
    };
    let read = |materializer: &Materializer| {
        let mut out = vec![0; expected.len()];
        materializer.read_once(&archive, 0, 0, &mut out).map(|_| assert!(out == expected))
    };
    // Working memory is not enough, and the cache lends the rest; with less than both it is said at once.
    let lends = materializer(8 * longest, longest);
    lends.check_fits(&archive).unwrap();
    read(&lends).unwrap();
    assert!(lends.cache_stats().bytes <= 8 * longest);
    let refuses = materializer(longest, longest / 2);
    let error = refuses.check_fits(&archive).unwrap_err();
    assert!(
        matches!(error, MaterializeError::TooLarge { .. }) && error.to_string().contains("memory limit"),
        "{error}"
    );
    assert!(matches!(read(&refuses), Err(MaterializeError::TooLarge { .. })));
}
