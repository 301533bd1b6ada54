//! Service lookup and the choice of a backend.
use strata_abi::{Addr, AffinityEntry, AffinityKey, Backend, BackendKey, Service, ServiceKey, proto, service_flag};

use crate::Maps;

/// What an address and port mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Not a service's address: the destination itself.
    Plain,
    Backend(Backend),
    /// The same, by an address that means nothing to the mesh.
    Outside(Backend),
    /// The service has no ready backend.
    NoBackend,
    /// The address is a service's and the port is none of its ports.
    UnknownPort,
}

/// Most slots looked at for the backend a client is bound to after the set has changed.
const AFFINITY_SCAN: u32 = 16;
const SECOND_NS: u64 = 1_000_000_000;

/// Resolves a destination. `client` is the caller's network namespace, what ClientIP affinity is counted by.
#[inline(always)]
pub fn resolve<M: Maps>(maps: &M, dst: &Addr, port: u16, proto: u8, client: u64) -> Target {
    let key = ServiceKey { addr: *dst, port, proto, _pad: 0 };
    // Twice: the agent may swap the set of backends between our reading the service and its backend.
    let mut attempt = 0;
    while attempt < 2 {
        attempt += 1;
        let Some(&service) = maps.service(&key) else {
            let any = ServiceKey { addr: *dst, port: 0, proto: proto::ANY, _pad: 0 };
            return if maps.service(&any).is_some() { Target::UnknownPort } else { Target::Plain };
        };
        if service.backend_count == 0 {
            return Target::NoBackend;
        }
        let chosen = if service.affinity_seconds == 0 {
            pick(maps, &service).map(|(backend, _)| backend)
        } else {
            pick_with_affinity(maps, &service, &key, client)
        };
        if let Some(backend) = chosen {
            let outside = service.flags & service_flag::OUTSIDE != 0;
            return if outside { Target::Outside(backend) } else { Target::Backend(backend) };
        }
    }
    Target::NoBackend
}

#[inline(always)]
fn pick<M: Maps>(maps: &M, service: &Service) -> Option<(Backend, u32)> {
    // Scaling by multiplication instead of a remainder: no division, and no bias worth the name below 2^16 backends.
    let slot = ((u64::from(maps.random()) * u64::from(service.backend_count)) >> 32) as u32;
    maps.backend(&BackendKey { backend_set: service.backend_set, slot }).map(|backend| (*backend, slot))
}

#[inline(always)]
fn pick_with_affinity<M: Maps>(maps: &M, service: &Service, key: &ServiceKey, client: u64) -> Option<Backend> {
    let affinity = AffinityKey { netns_cookie: client, addr: key.addr, port: key.port, proto: key.proto, _pad: [0; 5] };
    let now = maps.now_ns();
    let bound = match maps.affinity(&affinity) {
        Some(entry) if now.wrapping_sub(entry.last_ns) < u64::from(service.affinity_seconds) * SECOND_NS => {
            find(maps, service, entry)
        }
        _ => None,
    };
    let (backend, slot) = match bound {
        Some(found) => found,
        None => pick(maps, service)?,
    };
    let entry = AffinityEntry { last_ns: now, slot, port: backend.port, _pad: 0, addr: backend.addr };
    maps.set_affinity(&affinity, &entry);
    Some(backend)
}

/// The remembered backend in the current set: at its old slot, or (the set has changed) among the first ones.
#[inline(always)]
fn find<M: Maps>(maps: &M, service: &Service, entry: &AffinityEntry) -> Option<(Backend, u32)> {
    let at = |slot: u32| match maps.backend(&BackendKey { backend_set: service.backend_set, slot }) {
        Some(backend) if backend.addr == entry.addr && backend.port == entry.port => Some((*backend, slot)),
        _ => None,
    };
    if let Some(found) = at(entry.slot) {
        return Some(found);
    }
    let mut slot = 0;
    while slot < AFFINITY_SCAN && slot < service.backend_count {
        if let Some(found) = at(slot) {
            return Some(found);
        }
        slot += 1;
    }
    None
}

#[cfg(test)]
mod tests;
