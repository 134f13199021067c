//! The cache alone, with values that mean nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use proptest::prelude::*;

use super::*;

fn bytes(length: usize) -> Arc<[u8]> {
    vec![7; length].into()
}

fn make(length: usize) -> impl FnOnce() -> Result<Arc<[u8]>, String> {
    move || Ok(bytes(length))
}

/// Spins until `count` threads wait for the flight of `key`: each of them holds the flight.
fn until_waiting(cache: &Cache<u32>, key: u32, count: usize) {
    loop {
        let state = lock(&cache.state);
        // One count in the table and one held by the maker.
        if state.in_flight.get(&key).is_some_and(|flight| Arc::strong_count(flight) == 2 + count) {
            return;
        }
        drop(state);
        thread::yield_now();
    }
}

#[test]
fn concurrent_callers_of_one_key_share_one_make() {
    let cache = Cache::new(1000);
    let makes = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let value = cache.get_or_try_insert(1, || {
                    makes.fetch_add(1, Ordering::Relaxed);
                    until_waiting(&cache, 1, 7);
                    Ok::<_, String>(bytes(10))
                });
                assert_eq!(value.unwrap().len(), 10);
            });
        }
    });
    assert_eq!(makes.into_inner(), 1);
    let stats = cache.stats();
    assert_eq!((stats.misses, stats.shared, stats.hits, stats.duplicate_makes), (1, 7, 0, 0));
}

#[test]
fn waiters_share_the_error_and_a_later_caller_tries_again() {
    let cache = Cache::new(1000);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let result = cache.get_or_try_insert(1, || {
                    until_waiting(&cache, 1, 3);
                    Err("CRC".to_owned())
                });
                assert_eq!(result.unwrap_err(), "CRC");
            });
        }
    });
    assert_eq!(cache.stats().misses, 1);
    assert!(cache.get_or_try_insert(1, make(1)).is_ok());
    assert_eq!(cache.stats().duplicate_makes, 0, "a failed make made nothing");
}

#[test]
fn a_panicking_make_does_not_hang_the_waiters() {
    let cache = Cache::new(1000);
    let panics = AtomicU64::new(0);
    let first = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    cache.get_or_try_insert(1, || {
                        if first.fetch_add(1, Ordering::Relaxed) == 0 {
                            until_waiting(&cache, 1, 3);
                            panic!("a bug in the decoder");
                        }
                        Ok::<_, String>(bytes(3))
                    })
                }));
                match result {
                    Ok(value) => assert_eq!(value.unwrap().len(), 3),
                    Err(_) => drop(panics.fetch_add(1, Ordering::Relaxed)),
                }
            });
        }
    });
    assert_eq!(panics.into_inner(), 1);
    assert!(lock(&cache.state).in_flight.is_empty());
}

#[test]
fn callers_of_different_keys_do_not_wait_for_each_other() {
    let cache = Cache::new(1000);
    let both_making = Barrier::new(2);
    thread::scope(|scope| {
        for key in 0..2 {
            let (cache, both_making) = (&cache, &both_making);
            scope.spawn(move || {
                cache.get_or_try_insert(key, || {
                    both_making.wait();
                    Ok::<_, String>(bytes(1))
                })
            });
        }
    });
    assert_eq!(cache.stats().entries, 2);
}

#[test]
fn a_make_may_ask_for_its_reference() {
    let cache = Cache::new(1000);
    let layer_1 = cache.get_or_try_insert(1, || {
        let layer_0 = cache.get_or_try_insert(0, make(4))?;
        Ok::<_, String>([&layer_0[..], &[9]].concat().into())
    });
    assert_eq!(*layer_1.unwrap(), [7, 7, 7, 7, 9]);
}

#[test]
fn the_least_recently_used_value_goes_first() {
    let cache = Cache::new(30);
    for key in 0..3 {
        cache.get_or_try_insert(key, make(10)).unwrap();
    }
    assert!(cache.get(&0).is_some());
    cache.get_or_try_insert(3, make(5)).unwrap();
    assert!(cache.get(&1).is_none());
    assert!(cache.get(&0).is_some() && cache.get(&2).is_some() && cache.get(&3).is_some());
    let stats = cache.stats();
    assert_eq!((stats.bytes, stats.entries, stats.evictions, stats.budget_bytes), (25, 3, 1, 30));
}

#[test]
fn a_value_larger_than_the_budget_is_returned_and_not_kept() {
    let cache = Cache::new(10);
    cache.get_or_try_insert(0, make(10)).unwrap();
    assert_eq!(cache.get_or_try_insert(1, make(11)).unwrap().len(), 11);
    assert!(cache.get(&1).is_none());
    assert!(cache.get(&0).is_some(), "nothing was evicted in vain");
}

#[test]
fn making_an_evicted_value_again_counts_as_a_duplicate() {
    let cache = Cache::new(10);
    for key in [0, 1, 0, 1] {
        cache.get_or_try_insert(key, make(10)).unwrap();
    }
    assert_eq!(cache.stats().duplicate_makes, 2);
}

proptest! {
    #[test]
    fn the_budget_is_kept_and_every_answer_is_right(
        budget in 0..200_u64,
        requests in prop::collection::vec(0..20_u8, 0..200),
    ) {
        let cache = Cache::new(budget);
        for key in requests {
            let length = usize::from(key) * 7;
            prop_assert_eq!(cache.get_or_try_insert(key, make(length)).unwrap().len(), length);
            let held: usize = lock(&cache.state).entries.iter().map(|(_, value)| value.len()).sum();
            prop_assert_eq!(held as u64, cache.stats().bytes);
            prop_assert!(cache.stats().bytes <= budget);
        }
    }
}

#[test]
fn values_wanted_together_are_made_together_and_each_once() {
    let cache = Cache::new(1000);
    cache.get_or_try_insert(1, make(10)).unwrap();
    let mut asked = Vec::new();
    let values = cache.get_or_make_all(&[0, 1, 2, 3], |places| {
        asked.push(places.to_vec());
        places.iter().map(|&place| Ok::<_, String>(bytes(place))).collect()
    });
    assert_eq!(asked, [[0, 2, 3]]);
    assert_eq!(values.unwrap().iter().map(|value| value.len()).collect::<Vec<_>>(), [0, 10, 2, 3]);
    assert_eq!(cache.knows(&[0, 1, 2, 3, 4]), [true, true, true, true, false]);
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.entries), (1, 4, 4));
}

#[test]
fn a_caller_makes_its_own_part_while_another_makes_the_rest() {
    let cache = Cache::new(1000);
    let (first_claimed, both_making) = (Barrier::new(2), Barrier::new(2));
    let all = |places: &[usize]| -> Vec<Result<Arc<[u8]>, String>> { places.iter().map(|_| Ok(bytes(1))).collect() };
    thread::scope(|scope| {
        scope.spawn(|| {
            let values = cache.get_or_make_all(&[1, 2], |places| {
                first_claimed.wait();
                both_making.wait();
                all(places)
            });
            assert_eq!(values.unwrap().len(), 2);
        });
        first_claimed.wait();
        let values = cache.get_or_make_all(&[0, 1], |places| {
            both_making.wait();
            assert_eq!(places, [0], "the other is being made");
            all(places)
        });
        assert_eq!(values.unwrap().len(), 2);
    });
    assert_eq!((cache.stats().entries, cache.stats().misses, cache.stats().duplicate_makes), (3, 3, 0));
}

#[test]
fn one_value_that_cannot_be_made_takes_no_other_away() {
    let cache = Cache::new(1000);
    let make = |places: &[usize]| -> Vec<Result<Arc<[u8]>, String>> {
        places.iter().map(|&place| if place == 1 { Err("CRC".to_owned()) } else { Ok(bytes(5)) }).collect()
    };
    assert_eq!(cache.get_or_make_all(&["a", "b", "c"], make).unwrap_err(), "CRC");
    assert_eq!(cache.knows(&["a", "b", "c"]), [true, false, true]);
}

#[test]
fn what_is_forgotten_takes_no_room_and_making_it_again_is_no_duplicate() {
    let cache = Cache::new(20);
    for key in [0, 1] {
        cache.get_or_try_insert(key, make(10)).unwrap();
    }
    cache.forget(&[0, 7]);
    assert_eq!((cache.stats().bytes, cache.knows(&[0, 1])), (10, vec![false, true]));
    cache.get_or_try_insert(0, make(10)).unwrap();
    let stats = cache.stats();
    assert_eq!((stats.bytes, stats.evictions, stats.duplicate_makes), (20, 0, 0));
}

#[test]
fn what_is_lent_out_is_not_used() {
    let cache = Cache::new(100);
    let make = |key: u32| cache.get_or_try_insert(key, || Ok::<_, String>(Arc::from(vec![0; 30]))).unwrap();
    for key in 0..3 {
        make(key);
    }
    let loan = cache.lend(50);
    assert_eq!((cache.stats().bytes, cache.stats().evictions), (30, 2));
    make(3);
    assert_eq!(cache.stats().bytes, 30, "there is room for one");
    let rest = cache.lend(1000);
    make(4);
    assert_eq!(cache.stats().bytes, 0);
    drop((loan, rest));
    for key in 5..8 {
        make(key);
    }
    assert_eq!(cache.stats().bytes, 90);
}
