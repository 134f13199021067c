//! Byte-budgeted LRU cache of decoded bytes, with single flight: a value being made is made once, whoever asks.
//!
//! The cache holds one thing: served bytes, which are also what a prediction starts from. What a key means and how its
//! value is decoded is the caller's business: see [`crate::materialize`].
//!
//! The lock covers a look-up or an insertion, never a decode and never the freeing of what was evicted.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// Values by key, the least recently used evicted first once all of them together exceed the budget.
///
/// ```
/// # use std::sync::Arc;
/// # use mcwcfs::cache::Cache;
/// let cache = Cache::new(1 << 20);
/// let decode = || Ok::<_, String>(Arc::from([1, 2, 3]));
/// let first = cache.get_or_try_insert("layer 0", decode)?;
/// let second = cache.get_or_try_insert::<String>("layer 0", || unreachable!("it is there"))?;
/// assert!(Arc::ptr_eq(&first, &second));
/// # Ok::<_, String>(())
/// ```
pub struct Cache<K> {
    state: Mutex<State<K>>,
    budget_bytes: u64,
    hasher: RandomState,
}

/// What a cache holds and what it has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Look-ups that found their value.
    pub hits: u64,
    /// Look-ups that had to make their value, whether that succeeded or not.
    pub misses: u64,
    /// Look-ups that waited for another caller's `make` and took its result.
    pub shared: u64,
    /// Makes of a value that had been made before and was evicted since: work a larger budget would have saved.
    pub duplicate_makes: u64,
    /// Values dropped to stay within the budget.
    pub evictions: u64,
    /// Bytes held now.
    pub bytes: u64,
    /// Values held now.
    pub entries: u64,
    /// Bytes that may be held.
    pub budget_bytes: u64,
}

struct State<K> {
    entries: LruCache<K, Arc<[u8]>>,
    in_flight: HashMap<K, Arc<Flight>>,
    /// Hashes of all keys ever made: eight bytes each, so that duplicates can be counted after eviction.
    made: HashSet<u64>,
    stats: CacheStats,
}

/// One value being made, and the callers that wait for it.
#[derive(Default)]
struct Flight {
    landing: Mutex<Landing>,
    landed: Condvar,
}

#[derive(Default)]
enum Landing {
    #[default]
    InTheAir,
    Made(Arc<[u8]>),
    /// The maker's error. Type-erased because the cache's type does not name it: one cache serves every error type.
    Failed(Box<dyn Any + Send>),
    /// The maker panicked: whoever waits tries for itself.
    Abandoned,
}

impl Flight {
    fn land(&self, landing: Landing) {
        *lock(&self.landing) = landing;
        self.landed.notify_all();
    }

    /// The maker's result, or `None` where the caller must try for itself.
    fn wait<E: Clone + 'static>(&self) -> Option<Result<Arc<[u8]>, E>> {
        let landing = lock(&self.landing);
        let landing = self
            .landed
            .wait_while(landing, |landing| matches!(landing, Landing::InTheAir))
            .unwrap_or_else(PoisonError::into_inner);
        match &*landing {
            Landing::Made(value) => Some(Ok(Arc::clone(value))),
            Landing::Failed(error) => error.downcast_ref::<E>().map(|error| Err(error.clone())),
            Landing::InTheAir | Landing::Abandoned => None,
        }
    }
}

/// Ends a flight on every way out of its maker: by result, or by unwinding.
struct Pilot<'a, K: Hash + Eq> {
    cache: &'a Cache<K>,
    key: K,
    flight: &'a Flight,
    landing: Landing,
}

impl<K: Hash + Eq> Drop for Pilot<'_, K> {
    fn drop(&mut self) {
        // First out of the table, then the news: a woken waiter that retries must not find this flight again.
        lock(&self.cache.state).in_flight.remove(&self.key);
        self.flight.land(std::mem::replace(&mut self.landing, Landing::Abandoned));
    }
}

impl<K: Hash + Eq + Clone> Cache<K> {
    /// An empty cache that may hold `budget_bytes` of values.
    pub fn new(budget_bytes: u64) -> Self {
        let state = State {
            entries: LruCache::unbounded(),
            in_flight: HashMap::new(),
            made: HashSet::new(),
            stats: CacheStats { budget_bytes, ..CacheStats::default() },
        };
        Self { state: Mutex::new(state), budget_bytes, hasher: RandomState::new() }
    }

    /// The value for `key`, made by `make` if it is not there.
    ///
    /// Concurrent callers of one key wait for the one that makes it and share its result, value or error alike: a
    /// broken record fails once for all who wait, and is tried again by whoever asks later. If `make` panics, the panic
    /// goes to its caller and one of the waiters makes the value instead. A value larger than the budget is returned
    /// but not kept.
    ///
    /// `make` may ask the cache for other keys (a predicted layer asks for its reference), never for its own.
    pub fn get_or_try_insert<E: Clone + Send + 'static>(
        &self,
        key: K,
        make: impl FnOnce() -> Result<Arc<[u8]>, E>,
    ) -> Result<Arc<[u8]>, E> {
        loop {
            let flight = {
                let mut state = lock(&self.state);
                if let Some(value) = state.entries.get(&key) {
                    let value = Arc::clone(value);
                    state.stats.hits += 1;
                    return Ok(value);
                }
                if let Some(flight) = state.in_flight.get(&key) {
                    Arc::clone(flight)
                } else {
                    let flight = Arc::new(Flight::default());
                    state.in_flight.insert(key.clone(), Arc::clone(&flight));
                    state.stats.misses += 1;
                    drop(state);
                    return self.make(key, &flight, make);
                }
            };
            if let Some(result) = flight.wait() {
                lock(&self.state).stats.shared += 1;
                return result;
            }
        }
    }

    /// The value for `key` if it is there. A value being made is not there yet.
    pub fn get(&self, key: &K) -> Option<Arc<[u8]>> {
        let mut state = lock(&self.state);
        let value = state.entries.get(key).cloned();
        state.stats.hits += u64::from(value.is_some());
        value
    }

    /// What the cache holds and has done.
    pub fn stats(&self) -> CacheStats {
        let state = lock(&self.state);
        CacheStats { entries: state.entries.len() as u64, ..state.stats }
    }

    fn make<E: Clone + Send + 'static>(
        &self,
        key: K,
        flight: &Flight,
        make: impl FnOnce() -> Result<Arc<[u8]>, E>,
    ) -> Result<Arc<[u8]>, E> {
        let mut pilot = Pilot { cache: self, key, flight, landing: Landing::Abandoned };
        let result = make();
        match &result {
            Ok(value) => {
                self.keep(&pilot.key, value);
                pilot.landing = Landing::Made(Arc::clone(value));
            }
            Err(error) => pilot.landing = Landing::Failed(Box::new(error.clone())),
        }
        result
    }

    fn keep(&self, key: &K, value: &Arc<[u8]>) {
        let length_bytes = value.len() as u64;
        let key_hash = self.hasher.hash_one(key);
        let mut evicted = Vec::new(); // freed after the lock is: returning pages to the system takes its time
        let mut state = lock(&self.state);
        if !state.made.insert(key_hash) {
            state.stats.duplicate_makes += 1;
        }
        if length_bytes > self.budget_bytes {
            return;
        }
        while state.stats.bytes + length_bytes > self.budget_bytes {
            let (_, oldest) = state.entries.pop_lru().expect("bytes are held, so an entry holds them");
            state.stats.bytes -= oldest.len() as u64;
            state.stats.evictions += 1;
            evicted.push(oldest);
        }
        let replaced = state.entries.put(key.clone(), Arc::clone(value));
        assert!(replaced.is_none(), "one flight per key, and none for a key that is held");
        state.stats.bytes += length_bytes;
        drop(state);
    }
}

impl<K> fmt::Debug for Cache<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("Cache").field("stats", &state.stats).finish_non_exhaustive()
    }
}

/// No caller's code that could leave the state half-changed runs under these locks, so poison tells nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
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
}
