//! Who has used how much: one token bucket a user, in memory that all workers share.
//!
//! Shared data cannot be listed or deleted, so the table is a fixed number of values, each
//! with a fixed number of places; a user's hash says which value is theirs. Only the place
//! of a user whose bucket is full again is given to another: forgetting anyone else would
//! hand them a fresh bucket. Where no place is free, the newcomer is refused.
//!
//! A value changes by compare-and-set, so no two workers ever count from the same state.

use crate::Host;

/// What one request adds to a debt. A debt falls by its limit every nanosecond, hence by
/// limit × REQUEST in a minute: refilling needs no division and loses no fraction.
const REQUEST: u64 = MINUTE;
/// A minute in nanoseconds.
const MINUTE: u64 = 60 * SECOND;
const SECOND: u64 = 1_000_000_000;
/// Bytes of one place: hash 16, debt 8, time 8, limit 4.
const PLACE: usize = 36;
/// Places of one value: enough that values fill evenly, few enough to copy on every request.
const PLACES: u32 = 16;
/// Attempts at a compare-and-set. Each failed one means that another request was counted.
const ATTEMPTS: usize = 100;
/// A stored time this far ahead is no race between workers: the clock was set back.
const SKEW: u64 = SECOND;

/// The counted users. The numbers say only where to look; the content is the host's.
#[derive(Clone, Copy)]
pub struct Table {
    values: u64,
    places: usize,
}

/// What the table says of one request. Times are whole seconds, rounded up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Counted; `remaining` more may follow at once, and in `reset` the bucket is full again.
    Pass { remaining: u32, reset: u64 },
    /// Refused: the bucket is empty.
    Empty { retry: u64, reset: u64 },
    /// Refused: it could not be counted, for want of a place or of a quiet moment.
    Busy { retry: u64 },
}

#[derive(Clone, Copy)]
struct Place {
    user: u128,
    /// Tokens taken and not yet refilled, in REQUEST a token.
    debt: u64,
    /// When the debt was true, in nanoseconds since 1970.
    time: u64,
    /// The rate at which the debt falls: the limit of the last request that passed. An
    /// upgrade's tokens refill at the new rate from the first request under it.
    limit: u32,
}

impl Place {
    fn read(bytes: &[u8]) -> Option<Place> {
        let (user, rest) = bytes.split_first_chunk()?;
        let (debt, rest) = rest.split_first_chunk()?;
        let (time, rest) = rest.split_first_chunk()?;
        let (limit, _) = rest.split_first_chunk()?;
        Some(Place {
            user: u128::from_le_bytes(*user),
            debt: u64::from_le_bytes(*debt),
            time: u64::from_le_bytes(*time),
            limit: u32::from_le_bytes(*limit).max(1),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.user.to_le_bytes());
        out.extend_from_slice(&self.debt.to_le_bytes());
        out.extend_from_slice(&self.time.to_le_bytes());
        out.extend_from_slice(&self.limit.to_le_bytes());
    }

    /// The debt that is left now.
    fn debt(&self, now: u64) -> u64 {
        let paid = now.saturating_sub(self.time).saturating_mul(u64::from(self.limit));
        self.debt.saturating_sub(paid)
    }

    /// Seconds from now until the debt is at most `goal`.
    fn wait(&self, now: u64, goal: u64) -> u64 {
        let over = self.debt(now).saturating_sub(goal);
        over.div_ceil(u64::from(self.limit)).div_ceil(SECOND)
    }
}

impl Table {
    /// A table for at most that many users.
    pub fn new(users: u32) -> Table {
        let users = users.max(1);
        let values = users.div_ceil(PLACES);
        Table { values: u64::from(values), places: (users / values) as usize }
    }

    /// Counts one request of a user whose plan allows `limit` a minute.
    pub fn take(&self, host: &impl Host, user: u128, limit: u32) -> Verdict {
        let key = ["ratelimit/1/", &(user as u64 % self.values).to_string()].concat();
        let now = host.now();
        let mut scratch = Vec::with_capacity(self.places * PLACE);
        for _ in 0..ATTEMPTS {
            let (value, version) = match host.load(&key) {
                Some((value, version)) => (value, Some(version)),
                None => (Vec::new(), None),
            };
            let (verdict, changed) = self.judge(&value, user, limit.max(1), now, &mut scratch);
            if !changed || host.store(&key, &scratch, version) {
                return verdict;
            }
        }
        Verdict::Busy { retry: 1 }
    }

    /// Judges one request against a value, and writes the value that then holds to `out`.
    /// Returns whether it differs.
    fn judge(
        &self,
        value: &[u8],
        user: u128,
        limit: u32,
        now: u64,
        out: &mut Vec<u8>,
    ) -> (Verdict, bool) {
        out.clear();
        let mut mine = None;
        let mut rebased = false;
        let mut soonest = u64::MAX;
        // The user's own place is written last, so a value ends with its latest user.
        for place in value.chunks_exact(PLACE).filter_map(Place::read) {
            let mut place = place;
            if place.time > now.saturating_add(SKEW) {
                // Else the debt would stand still until the clock gets there again.
                place.time = now;
                rebased = true;
            }
            if place.user == user {
                mine = Some(place);
                continue;
            }
            if place.debt(now) > 0 {
                soonest = soonest.min(place.wait(now, 0));
                place.write(out);
            }
        }
        let full = out.len() / PLACE >= self.places;
        let mut place = match mine {
            Some(place) => place,
            None if full => return (Verdict::Busy { retry: soonest.clamp(1, 60) }, rebased),
            None => Place { user, debt: 0, time: now, limit },
        };
        let debt = place.debt(now);
        let capacity = u64::from(limit) * REQUEST;
        if debt.saturating_add(REQUEST) > capacity {
            let verdict = Verdict::Empty {
                retry: place.wait(now, capacity - REQUEST).max(1),
                reset: place.wait(now, 0),
            };
            place.write(out);
            return (verdict, rebased);
        }
        place = Place { user, debt: debt + REQUEST, time: now.max(place.time), limit };
        place.write(out);
        let remaining = ((capacity - place.debt) / REQUEST) as u32;
        (Verdict::Pass { remaining, reset: place.wait(now, 0) }, true)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::cell::Cell;
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::sync::Mutex;

    /// Shared data and a clock, with the proxy's rules, usable from threads.
    #[derive(Default)]
    pub struct Memory {
        pub clock: AtomicU64,
        pub values: Mutex<HashMap<String, (Vec<u8>, u32)>>,
        versions: AtomicU32,
    }

    impl Host for Memory {
        fn header(&self, _: &str) -> Option<Vec<u8>> {
            None
        }
        fn now(&self) -> u64 {
            self.clock.load(Ordering::SeqCst)
        }
        fn load(&self, key: &str) -> Option<(Vec<u8>, u32)> {
            self.values.lock().expect("no panic under the lock").get(key).cloned()
        }
        fn store(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
            let mut values = self.values.lock().expect("no panic under the lock");
            if values.get(key).map(|(_, v)| *v) != version {
                return false;
            }
            let version = 1 + self.versions.fetch_add(1, Ordering::SeqCst);
            values.insert(key.to_string(), (value.to_vec(), version));
            true
        }
    }

    impl Memory {
        pub fn at(seconds: u64) -> Memory {
            let memory = Memory::default();
            memory.clock.store(seconds * SECOND, Ordering::SeqCst);
            memory
        }
        pub fn pass(&self, seconds: f64) {
            self.clock.fetch_add((seconds * 1e9) as u64, Ordering::SeqCst);
        }
    }

    fn passed(table: Table, host: &impl Host, user: u128, limit: u32, requests: usize) -> usize {
        (0..requests)
            .filter(|_| matches!(table.take(host, user, limit), Verdict::Pass { .. }))
            .count()
    }

    #[test]
    fn a_bucket_holds_the_limit_and_refills_evenly() {
        let (host, table) = (Memory::at(1000), Table::new(10));
        assert_eq!(table.take(&host, 1, 10), Verdict::Pass { remaining: 9, reset: 6 });
        assert_eq!(passed(table, &host, 1, 10, 50), 9);
        assert_eq!(table.take(&host, 1, 10), Verdict::Empty { retry: 6, reset: 60 });
        host.pass(5.999_999_999);
        assert_eq!(table.take(&host, 1, 10), Verdict::Empty { retry: 1, reset: 55 });
        host.pass(0.000_000_001);
        assert_eq!(table.take(&host, 1, 10), Verdict::Pass { remaining: 0, reset: 60 });
        host.pass(30.0);
        assert_eq!(passed(table, &host, 1, 10, 50), 5);
        host.pass(3600.0);
        assert_eq!(passed(table, &host, 1, 10, 50), 10);
    }

    #[test]
    fn odd_limits_lose_no_fraction() {
        let (host, table) = (Memory::at(1000), Table::new(10));
        let mut total = passed(table, &host, 1, 7, 20);
        for _ in 0..7000 {
            host.pass(0.0613);
            total += passed(table, &host, 1, 7, 2);
        }
        // 7 at once, and 7 a minute for 7000 × 0.0613 s.
        assert_eq!(total, 7 + (7.0 * 7000.0 * 0.0613 / 60.0) as usize);
    }

    #[test]
    fn users_do_not_share() {
        let (host, table) = (Memory::at(1000), Table::new(100));
        assert_eq!(passed(table, &host, 1, 10, 20), 10);
        assert_eq!(passed(table, &host, 1 + 7, 10, 20), 10);
    }

    #[test]
    fn an_upgrade_lifts_the_limit_at_once() {
        let (host, table) = (Memory::at(1000), Table::new(100));
        assert_eq!(passed(table, &host, 1, 10, 20), 10);
        assert_eq!(passed(table, &host, 1, 100, 200), 90);
        assert_eq!(passed(table, &host, 1, 10, 20), 0);
    }

    #[test]
    fn two_plans_by_turns_give_no_more_than_the_larger() {
        let (host, table) = (Memory::at(1000), Table::new(100));
        let mut total = 0;
        for _ in 0..600 {
            total += passed(table, &host, 1, 100, 5) + passed(table, &host, 1, 10, 5);
            host.pass(0.1);
        }
        assert!(total <= 200, "{total} passed in a minute");
    }

    #[test]
    fn a_full_table_refuses_newcomers_until_a_bucket_is_full_again() {
        let (host, table) = (Memory::at(1000), Table::new(4));
        for user in 0..4 {
            assert_eq!(passed(table, &host, user, 10, 1 + user as usize), 1 + user as usize);
        }
        assert_eq!(table.take(&host, 9, 10), Verdict::Busy { retry: 6 });
        assert_eq!(passed(table, &host, 9, 10, 100), 0);
        // Those inside keep their own count.
        assert_eq!(passed(table, &host, 3, 10, 100), 6);
        host.pass(6.0);
        assert_eq!(passed(table, &host, 9, 10, 100), 10);
        assert_eq!(table.take(&host, 10, 10), Verdict::Busy { retry: 6 });
    }

    #[test]
    fn the_table_is_bounded_and_nobody_passes_more_than_the_limit() {
        let (host, table) = (Memory::at(1000), Table::new(500));
        let mut total = 0;
        for round in 0..3 {
            for user in 0..5000u128 {
                let got =
                    passed(table, &host, user.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c), 10, 4);
                assert!(got <= 4);
                total += if round == 0 { got } else { 0 };
            }
        }
        assert!(total <= 500 * 4, "{total} passed of at most 500 users");
        let values = host.values.lock().expect("no panic under the lock");
        assert!(values.len() <= 32);
        assert!(values.values().map(|(v, _)| v.len() / PLACE).sum::<usize>() <= 500);
    }

    #[test]
    fn a_table_never_has_more_places_than_users() {
        for users in 1..5000 {
            let table = Table::new(users);
            let places = table.values * table.places as u64;
            assert!(places <= u64::from(users) && places * 10 >= u64::from(users) * 5, "{users}");
        }
    }

    #[test]
    fn a_clock_set_back_locks_nobody_out() {
        let (host, table) = (Memory::at(100_000), Table::new(4));
        assert_eq!(passed(table, &host, 1, 10, 20), 10);
        host.clock.store(1000 * SECOND, Ordering::SeqCst);
        assert_eq!(passed(table, &host, 1, 10, 20), 0);
        host.pass(6.0);
        assert_eq!(passed(table, &host, 1, 10, 20), 1);
    }

    #[test]
    fn exact_over_threads() {
        let (host, table) = (Memory::at(1000), Table::new(10_000));
        let total: usize = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| passed(table, &host, 1, 10, 25))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).sum()
        });
        assert_eq!(total, 10);
    }

    #[test]
    fn a_store_that_never_agrees_lets_nobody_pass() {
        struct Stubborn(Cell<u32>);
        impl Host for Stubborn {
            fn header(&self, _: &str) -> Option<Vec<u8>> {
                None
            }
            fn now(&self) -> u64 {
                1
            }
            fn load(&self, _: &str) -> Option<(Vec<u8>, u32)> {
                None
            }
            fn store(&self, _: &str, _: &[u8], _: Option<u32>) -> bool {
                self.0.set(self.0.get() + 1);
                false
            }
        }
        let host = Stubborn(Cell::new(0));
        assert_eq!(Table::new(10).take(&host, 1, 10), Verdict::Busy { retry: 1 });
        assert_eq!(host.0.get() as usize, ATTEMPTS);
    }
}
