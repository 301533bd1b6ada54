//! Numbers for sets of backends.
use std::collections::{BTreeMap, BTreeSet};

use strata_abi::Backend;

/// Gives every distinct set of backends a number, so that a changed set always gets another one: a reader that
/// holds the old number never meets the new set's members.
///
/// Kept by the caller between compilations. Numbers are not reused until the counter wraps around.
#[derive(Clone, Debug, Default)]
pub struct BackendSets {
    last: u32,
    numbers: BTreeMap<Vec<Backend>, u32>,
    /// The values of `numbers`.
    taken: BTreeSet<u32>,
}

impl BackendSets {
    /// An allocator that only gives numbers after `last`: for a start over maps an earlier process filled.
    pub fn after(last: u32) -> BackendSets {
        BackendSets { last, ..BackendSets::default() }
    }

    /// The number of this set (sorted, without repetition). 0 is the empty set, and no other.
    pub(crate) fn number(&mut self, backends: &[Backend]) -> u32 {
        if backends.is_empty() {
            return 0;
        }
        if let Some(number) = self.numbers.get(backends) {
            return *number;
        }
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.taken.contains(&self.last) {
                break;
            }
        }
        self.taken.insert(self.last);
        self.numbers.insert(backends.to_vec(), self.last);
        self.last
    }

    /// Forgets the sets nobody uses any more.
    pub(crate) fn retain(&mut self, used: &BTreeSet<u32>) {
        self.numbers.retain(|_, number| used.contains(number));
        self.taken.retain(|number| used.contains(number));
    }
}
