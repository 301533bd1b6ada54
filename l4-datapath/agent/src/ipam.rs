//! Addresses for pods from the node's ranges.
//!
//! Which addresses are taken is not stored here: the registry of pods is the one truth, and [`Ipam`] is rebuilt from
//! it. The position after the last one given out is kept, so that a freed address rests as long as possible.
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Why no address was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IpamError {
    #[error("the node has no range of pod addresses yet (Node spec.podCIDRs)")]
    NoRange,
    #[error("the node's range {0} has no free address")]
    Exhausted(IpNet),
}

/// Where the search for the next address starts; kept over restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Positions {
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
}

/// A pod's addresses, one of each family the node has a range of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
}

impl Lease {
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }
}

/// The node's ranges and what is taken of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ipam {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
    taken: BTreeSet<IpAddr>,
    positions: Positions,
}

impl Ipam {
    /// Nothing taken, no range.
    pub(crate) fn new(positions: Positions) -> Ipam {
        Ipam { positions, ..Ipam::default() }
    }

    /// The node's ranges: the first of each family counts. Leases outside a new range stay valid.
    pub(crate) fn set_ranges(&mut self, ranges: &[IpNet]) {
        self.v4 = ranges.iter().find_map(|range| if let IpNet::V4(v4) = range { Some(v4.trunc()) } else { None });
        self.v6 = ranges.iter().find_map(|range| if let IpNet::V6(v6) = range { Some(v6.trunc()) } else { None });
    }

    pub(crate) fn has_range(&self) -> bool {
        self.v4.is_some() || self.v6.is_some()
    }

    pub(crate) fn positions(&self) -> Positions {
        self.positions
    }

    /// Marks addresses as taken (of a pod that was there before).
    pub(crate) fn reserve(&mut self, lease: &Lease) {
        self.taken.extend(lease.addresses());
    }

    /// Gives addresses back; free ones are fine.
    pub(crate) fn release(&mut self, lease: &Lease) {
        for address in lease.addresses() {
            self.taken.remove(&address);
        }
    }

    /// A free address of each family; both or none.
    ///
    /// # Errors
    /// If there is no range, or one of the ranges is used up.
    pub(crate) fn allocate(&mut self) -> Result<Lease, IpamError> {
        if !self.has_range() {
            return Err(IpamError::NoRange);
        }
        let v4 = self.v4.map(|range| self.free_v4(range)).transpose()?;
        let v6 = self.v6.map(|range| self.free_v6(range)).transpose()?;
        let lease = Lease { v4, v6 };
        self.reserve(&lease);
        self.positions = Positions { v4: v4.or(self.positions.v4), v6: v6.or(self.positions.v6) };
        Ok(lease)
    }

    fn free_v4(&self, range: Ipv4Net) -> Result<Ipv4Addr, IpamError> {
        let (network, broadcast) = (u32::from(range.network()), u32::from(range.broadcast()));
        // Without network, gateway by convention (.1), broadcast; of tiny ranges everything.
        let (first, last) = if range.prefix_len() > 29 { (network, broadcast) } else { (network + 2, broadcast - 1) };
        let after = self.positions.v4.map(|v4| u128::from(u32::from(v4)));
        let taken = |n: u128| u32::try_from(n).is_ok_and(|n| self.taken.contains(&Ipv4Addr::from(n).into()));
        match free(first.into(), last.into(), after, self.taken.len(), taken).map(u32::try_from) {
            Some(Ok(n)) => Ok(n.into()),
            _ => Err(IpamError::Exhausted(range.into())),
        }
    }

    fn free_v6(&self, range: Ipv6Net) -> Result<Ipv6Addr, IpamError> {
        let (network, end) = (u128::from(range.network()), u128::from(range.broadcast()));
        let first = if range.prefix_len() > 125 { network } else { network + 2 };
        let after = self.positions.v6.map(u128::from);
        let taken = |n: u128| self.taken.contains(&Ipv6Addr::from(n).into());
        free(first, end, after, self.taken.len(), taken).map(Ipv6Addr::from).ok_or(IpamError::Exhausted(range.into()))
    }
}

/// The first number in `first..=last` that is not taken, searched from the one after `after` on, once around. Looks
/// at no more numbers than are taken, plus one.
fn free(first: u128, last: u128, after: Option<u128>, most: usize, taken: impl Fn(u128) -> bool) -> Option<u128> {
    let start = after.filter(|after| (first..last).contains(after)).map_or(first, |after| after + 1);
    let next = |n: &u128| Some(if *n == last { first } else { n + 1 });
    let size = (last - first).saturating_add(1);
    let looks = size.min(most as u128 + 1);
    std::iter::successors(Some(start), next).take(usize::try_from(looks).unwrap_or(usize::MAX)).find(|n| !taken(*n))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ipam(ranges: &[&str]) -> Ipam {
        let mut ipam = Ipam::default();
        ipam.set_ranges(&ranges.iter().map(|range| range.parse().unwrap()).collect::<Vec<_>>());
        ipam
    }

    #[test]
    fn reserved_addresses_of_a_range_are_not_given() {
        let mut ipam = ipam(&["10.1.0.0/28", "fd01::/64"]);
        let first = ipam.allocate().unwrap();
        assert_eq!(first.addresses().map(|a| a.to_string()).collect::<Vec<_>>(), ["10.1.0.2", "fd01::2"]);
        let rest: Vec<Lease> = std::iter::from_fn(|| ipam.allocate().ok()).collect();
        assert_eq!(rest.len(), 12);
        assert_eq!(rest[11].v4, Some(Ipv4Addr::new(10, 1, 0, 14)));
        assert_eq!(ipam.allocate(), Err(IpamError::Exhausted("10.1.0.0/28".parse().unwrap())));
    }

    #[test]
    fn a_freed_address_rests() {
        let mut ipam = ipam(&["10.1.0.0/24"]);
        let first = ipam.allocate().unwrap();
        ipam.release(&first);
        assert_ne!(ipam.allocate().unwrap(), first);
    }

    #[test]
    fn without_a_range_nothing_is_given() {
        assert_eq!(Ipam::default().allocate(), Err(IpamError::NoRange));
        let small = ipam(&["10.0.0.4/32", "fd01::4/128"]).allocate().unwrap();
        assert_eq!(small.addresses().map(|a| a.to_string()).collect::<Vec<_>>(), ["10.0.0.4", "fd01::4"]);
    }

    proptest! {
        /// Whatever is allocated, released and restarted in between: nobody gets an address somebody has.
        #[test]
        fn never_gives_an_address_twice(steps in prop::collection::vec(0u8..12, 1..200), prefix in 26u8..=32) {
            let range: IpNet = format!("10.3.0.0/{prefix}").parse().unwrap();
            let mut ipam = Ipam::default();
            ipam.set_ranges(&[range, "fd03::/120".parse().unwrap()]);
            let mut held: Vec<Lease> = Vec::new();
            for step in steps {
                match step {
                    0..=7 => if let Ok(lease) = ipam.allocate() {
                        for other in &held {
                            prop_assert!(lease.v4 != other.v4 && lease.v6 != other.v6);
                        }
                        prop_assert!(lease.addresses().all(|a| range.contains(&a) || a.is_ipv6()));
                        held.push(lease);
                    },
                    8 | 9 => if !held.is_empty() {
                        let lease = held.swap_remove(usize::from(step) % held.len());
                        ipam.release(&lease);
                    },
                    // A restart: positions come from the state file, leases from the registry.
                    _ => {
                        let text = serde_json::to_string(&ipam.positions()).unwrap();
                        ipam = Ipam::new(serde_json::from_str(&text).unwrap());
                        ipam.set_ranges(&[range, "fd03::/120".parse().unwrap()]);
                        held.iter().for_each(|lease| ipam.reserve(lease));
                    }
                }
            }
        }

        /// A range is given out completely before it is exhausted.
        #[test]
        fn gives_the_whole_range(prefix in 24u8..=32) {
            let mut ipam = ipam(&[&format!("10.3.0.0/{prefix}")]);
            let count = std::iter::from_fn(|| ipam.allocate().ok()).count();
            let size = 1usize << (32 - prefix);
            prop_assert_eq!(count, if prefix > 29 { size } else { size - 3 });
        }
    }
}
