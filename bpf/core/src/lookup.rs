//! `sk_lookup`: whose is a new TCP connection that arrives in an enrolled pod's namespace?
use strata_abi::{Addr, listener, proto};

use crate::{HBONE_PORT, Maps, granted, is_node};

/// Interface index of the loopback device, in every namespace.
const LOOPBACK: u32 = 1;

/// The pod this instance of the program serves. The hook cannot ask for its namespace.
#[derive(Clone, Copy, Debug)]
pub struct Pod {
    pub v4: Addr,
    pub v6: Addr,
}

/// The lookup's tuple.
#[derive(Clone, Copy, Debug)]
pub struct Tuple {
    pub proto: u8,
    /// Destination of the packet.
    pub local: Addr,
    pub local_port: u16,
    /// Source of the packet.
    pub remote: Addr,
    /// Device the packet came in by; for looped-back packets the device that owns the address, unless the sender was
    /// bound to lo.
    pub ingress_ifindex: u32,
}

/// Who gets the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// The ordinary lookup: the application.
    App,
    /// The proxy's listener of this kind, or nobody.
    Listener(u32),
}

/// Decides; `docs/architecture.md`, "The way of a connection" 2 and 3.
#[inline(always)]
pub fn choose<M: Maps>(maps: &M, pod: &Pod, tuple: &Tuple) -> Choice {
    // 1. Only TCP is captured; the pod's loopback is its own.
    if tuple.proto != proto::TCP || tuple.local.is_loopback() {
        return Choice::App;
    }
    let own = tuple.local == pod.v4 || tuple.local == pod.v6 || tuple.local.is_v6_link_local();
    let v6 = tuple.local.as_v4().is_none();
    // 2. A destination that is not the pod's can only have come by the capture rule: it leaves the pod.
    if !own {
        return Choice::Listener(if v6 { listener::OUTBOUND_V6 } else { listener::OUTBOUND_V4 });
    }
    // 3. Tunnels, from the pod itself too (a meshed pod that calls its own service).
    let by_loopback = tuple.ingress_ifindex == LOOPBACK;
    if tuple.local_port == HBONE_PORT && !by_loopback {
        return Choice::Listener(if v6 { listener::HBONE_V6 } else { listener::HBONE_V4 });
    }
    // 4. The pod to itself, and the proxy's hop to the application: it alone is bound to lo with another's address.
    if by_loopback || tuple.remote == tuple.local || tuple.remote.is_loopback() {
        return Choice::App;
    }
    // 5. Probes: the node's own processes reach the application of its pods, known by origin as the address cannot be taken
    //    by a pod of this node (spoof check) nor come from outside (it is ours).
    if is_node(maps, &tuple.remote) {
        return Choice::App;
    }
    // 6. The granted short-cut.
    if granted(maps, &tuple.remote, &tuple.local, tuple.local_port) {
        return Choice::App;
    }
    // 7. Everything else is plaintext from outside: the proxy judges it.
    Choice::Listener(if v6 { listener::INBOUND_V6 } else { listener::INBOUND_V4 })
}

#[cfg(test)]
mod tests;
