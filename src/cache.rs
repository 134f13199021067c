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
    /// What of the budget is lent out.
    lent_bytes: u64,
    stats: CacheStats,
}

/// A part of a cache's budget that it does not use until this is dropped.
#[derive(Debug)]
pub struct Loan<'a, K> {
    cache: &'a Cache<K>,
    bytes: u64,
}

impl<K> Drop for Loan<'_, K> {
    fn drop(&mut self) {
        lock(&self.cache.state).lent_bytes -= self.bytes;
    }
}

impl<K: Hash + Eq> State<K> {
    /// Drops the values used least recently until the others take `bytes` at most; returns them, to be freed after the lock.
    fn evict_down_to(&mut self, bytes: u64) -> Vec<Arc<[u8]>> {
        let mut evicted = Vec::new();
        while self.stats.bytes > bytes {
            let (_, oldest) = self.entries.pop_lru().expect("bytes are held, so an entry holds them");
            self.stats.bytes -= oldest.len() as u64;
            self.stats.evictions += 1;
            evicted.push(oldest);
        }
        evicted
    }
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
    flight: Arc<Flight>,
    landing: Landing,
}

impl<K: Hash + Eq + Clone> Pilot<'_, K> {
    /// Keeps what was made, and lets those who wait have it.
    fn land<E: Clone + Send + 'static>(mut self, made: Result<Arc<[u8]>, E>) -> Result<Arc<[u8]>, E> {
        self.landing = match &made {
            Ok(value) => {
                self.cache.keep(&self.key, value);
                Landing::Made(Arc::clone(value))
            }
            Err(error) => Landing::Failed(Box::new(error.clone())),
        };
        made
    }
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
            lent_bytes: 0,
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
        let mut make = Some(make);
        let mut values = self.get_or_make_all(&[key], |_| {
            let make = make.take().expect("whoever made the value once is not asked again");
            vec![make()]
        })?;
        Ok(values.pop().expect("one value per key"))
    }

    /// The values for `keys`, which must differ from one another: as [`get_or_try_insert`](Self::get_or_try_insert), with
    /// those that nobody has and nobody makes made together.
    ///
    /// `make` is given their places in `keys` and returns one result for each, in that order. It must not ask the cache
    /// for any key that another caller may make together with one of these.
    ///
    /// # Errors
    /// One of the errors, after all values that could be made are there.
    pub fn get_or_make_all<E: Clone + Send + 'static>(
        &self,
        keys: &[K],
        mut make: impl FnMut(&[usize]) -> Vec<Result<Arc<[u8]>, E>>,
    ) -> Result<Vec<Arc<[u8]>>, E> {
        let mut values = vec![None; keys.len()];
        while values.iter().any(Option::is_none) {
            let (mine, theirs) = self.claim(keys, &mut values);
            if !mine.is_empty() {
                let places: Vec<usize> = mine.iter().map(|(place, _)| *place).collect();
                let results = make(&places);
                assert_eq!(results.len(), mine.len(), "one result per value asked for");
                // All land before anyone is waited for: two callers that each make what the other needs both go on.
                let landed: Vec<_> = mine.into_iter().zip(results).map(|((_, pilot), made)| pilot.land(made)).collect();
                for (place, made) in places.into_iter().zip(landed) {
                    values[place] = Some(made?);
                }
            }
            for (place, flight) in theirs {
                if let Some(made) = flight.wait() {
                    lock(&self.state).stats.shared += 1;
                    values[place] = Some(made?);
                }
            }
        }
        Ok(values.into_iter().map(|value| value.expect("the loop ends when all are there")).collect())
    }

    /// Fills in the values that are there. The others are the caller's to make, or being made by somebody else.
    #[allow(clippy::type_complexity)] // two lists of what stands at a place
    fn claim(
        &self,
        keys: &[K],
        values: &mut [Option<Arc<[u8]>>],
    ) -> (Vec<(usize, Pilot<'_, K>)>, Vec<(usize, Arc<Flight>)>) {
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        let mut state = lock(&self.state);
        for (place, (key, value)) in keys.iter().zip(values).enumerate().filter(|(_, (_, value))| value.is_none()) {
            if let Some(found) = state.entries.get(key) {
                *value = Some(Arc::clone(found));
                state.stats.hits += 1;
            } else if let Some(flight) = state.in_flight.get(key) {
                theirs.push((place, Arc::clone(flight)));
            } else {
                let flight = Arc::new(Flight::default());
                state.in_flight.insert(key.clone(), Arc::clone(&flight));
                state.stats.misses += 1;
                mine.push((place, Pilot { cache: self, key: key.clone(), flight, landing: Landing::Abandoned }));
            }
        }
        drop(state);
        (mine, theirs)
    }

    /// The value for `key` if it is there. A value being made is not there yet.
    pub fn get(&self, key: &K) -> Option<Arc<[u8]>> {
        let mut state = lock(&self.state);
        let value = state.entries.get(key).cloned();
        state.stats.hits += u64::from(value.is_some());
        value
    }

    /// Which of `keys` are there or being made now.
    pub fn knows(&self, keys: &[K]) -> Vec<bool> {
        let state = lock(&self.state);
        keys.iter().map(|key| state.entries.contains(key) || state.in_flight.contains_key(key)).collect()
    }

    /// Lets go of values that nobody will ask for again.
    pub fn forget(&self, keys: &[K]) {
        let mut forgotten = Vec::new(); // freed after the lock is
        let mut state = lock(&self.state);
        for key in keys {
            if let Some(value) = state.entries.pop(key) {
                state.stats.bytes -= value.len() as u64;
                forgotten.push(value);
            }
            state.made.remove(&self.hasher.hash_one(key)); // if it is made again, then for another purpose
        }
        drop(state);
    }

    /// Lends `bytes` of the budget out, or what is left of it; what is held makes room now.
    pub fn lend(&self, bytes: u64) -> Loan<'_, K> {
        let mut state = lock(&self.state);
        let bytes = bytes.min(self.budget_bytes - state.lent_bytes);
        state.lent_bytes += bytes;
        let left = self.budget_bytes - state.lent_bytes;
        let evicted = state.evict_down_to(left);
        drop(state);
        drop(evicted);
        Loan { cache: self, bytes }
    }

    /// What the cache holds and has done.
    pub fn stats(&self) -> CacheStats {
        let state = lock(&self.state);
        CacheStats { entries: state.entries.len() as u64, ..state.stats }
    }

    fn keep(&self, key: &K, value: &Arc<[u8]>) {
        let length_bytes = value.len() as u64;
        let key_hash = self.hasher.hash_one(key);
        let mut state = lock(&self.state);
        if !state.made.insert(key_hash) {
            state.stats.duplicate_makes += 1;
        }
        let budget_bytes = self.budget_bytes - state.lent_bytes;
        if length_bytes > budget_bytes {
            return;
        }
        let evicted = state.evict_down_to(budget_bytes - length_bytes);
        let replaced = state.entries.put(key.clone(), Arc::clone(value));
        assert!(replaced.is_none(), "one flight per key, and none for a key that is held");
        state.stats.bytes += length_bytes;
        drop(state);
        drop(evicted); // after the lock is free: returning pages to the system takes its time
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
mod tests;
