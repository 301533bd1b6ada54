//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): every host fills slots of a prime-sized table in the
//! order of its own permutation; keys spread almost evenly and few move when a host comes or goes.

use xxhash_rust::xxh64::xxh64;

#[derive(Debug)]
pub(super) struct Maglev {
    slots: Vec<u32>,
    hosts: usize,
}

const FREE: u32 = u32::MAX;

impl Maglev {
    pub(super) fn new(hosts: &[(&str, u32)], table_size: u32) -> Self {
        let size = u64::from(table_size.max(2));
        let mut slots = vec![FREE; if hosts.is_empty() { 0 } else { size as usize }];
        let heaviest = hosts.iter().map(|(_, weight)| (*weight).max(1)).max().unwrap_or(1);
        let mut fill: Vec<Permutation> =
            hosts.iter().map(|(name, weight)| Permutation::new(name, *weight, size)).collect();
        let (mut filled, mut round) = (0, 0u64);
        while filled < slots.len() {
            round += 1;
            for (position, host) in fill.iter_mut().enumerate() {
                if filled == slots.len() {
                    break;
                }
                // A lighter host sits out rounds in proportion.
                if round * host.weight < host.taken * u64::from(heaviest) {
                    continue;
                }
                host.taken += 1;
                let slot = host.next_free(&slots, size);
                slots[slot] = position as u32;
                filled += 1;
            }
        }
        Self { slots, hosts: hosts.len() }
    }

    /// A host that is out leaves its keys to slots found by hashing again, so that they spread over all others.
    pub(super) fn pick(&self, key: u64, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut key = key;
        for attempt in 0..8u64 {
            let position = self.slots[(key % self.slots.len() as u64) as usize] as usize;
            if usable(position) {
                return Some(position);
            }
            key = xxh64(&key.to_le_bytes(), attempt);
        }
        let start = (key % self.hosts as u64) as usize;
        (start..self.hosts).chain(0..start).find(|position| usable(*position))
    }
}

struct Permutation {
    offset: u64,
    skip: u64,
    next: u64,
    weight: u64,
    /// Turns taken so far.
    taken: u64,
}

impl Permutation {
    fn new(name: &str, weight: u32, size: u64) -> Self {
        let offset = xxh64(name.as_bytes(), 0) % size;
        let skip = xxh64(name.as_bytes(), 1) % (size - 1) + 1;
        Self { offset, skip, next: 0, weight: u64::from(weight.max(1)), taken: 0 }
    }

    /// The next slot of this host's permutation that nobody has. Terminates while a slot is free when the size is
    /// prime; for other sizes the walk goes on slot by slot after one full round.
    fn next_free(&mut self, slots: &[u32], size: u64) -> usize {
        loop {
            let slot = if self.next < size {
                (self.offset + self.next * self.skip) % size
            } else {
                (self.offset + self.next) % size
            };
            self.next += 1;
            if slots[slot as usize] == FREE {
                return slot as usize;
            }
        }
    }
}
