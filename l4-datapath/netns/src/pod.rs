//! A pod's device: a veth pair routed point to point, without a bridge and without ARP.
//!
//! The pod has its addresses as /32 and /128, a default route through an address nobody owns (169.254.1.1, fe80::1)
//! and permanent neighbour entries that give those the host end's MAC; the host has one route and one permanent
//! neighbour entry for each of the pod's addresses. The host end comes up last ([`activate`]), after the caller has
//! put the pod's policy in force: until then no packet passes.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::route::RouteScope;

use crate::netlink::route_to;
use crate::{Error, Link, Netlink, run_in, sysctl};

const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const LOOPBACK: u32 = 1;
/// How often, and with what pause, a new device is asked whether packets pass.
const CARRIER_LOOKS: u32 = 200;
const CARRIER_PAUSE: Duration = Duration::from_millis(5);

/// What to wire.
#[derive(Clone, Debug)]
pub struct PodWiring<'a> {
    pub netns: BorrowedFd<'a>,
    /// Name of the device inside the pod (`eth0`).
    pub ifname: &'a str,
    /// Name of the device on the node; see [`host_device_name`].
    pub host_device: &'a str,
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
    pub mtu: u32,
}

impl PodWiring<'_> {
    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }
}

/// A wired pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wired {
    /// The node's end.
    pub host: Link,
    /// The pod's end.
    pub pod: Link,
}

/// The address a pod with `address` routes everything through; nobody owns it.
pub fn gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

/// A device name of at most 15 bytes, the same for the same key (container id and device).
pub fn host_device_name(key: &str) -> String {
    format!("st{:012x}", fnv(key) & 0xffff_ffff_ffff)
}

/// A locally administered unicast MAC, the same for the same key. Set explicitly because udev replaces random ones,
/// which would leave the permanent neighbour entries wrong.
pub fn mac_of(key: &str) -> [u8; 6] {
    let bytes = fnv(key).to_be_bytes();
    [0x02, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
}

/// FNV-1a; names need a spread that never changes between versions, not more.
fn fnv(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Makes the pair and sets up the pod's end completely, and the node's end except for bringing it up.
/// A half-made pair of the same name from an interrupted call is replaced.
///
/// # Errors
/// The first step the kernel refused; the pair is removed again.
pub async fn wire(node: &Netlink, wiring: &PodWiring<'_>) -> Result<Wired, Error> {
    if let Some(stale) = node.find_link(wiring.host_device).await? {
        node.delete_link(stale.index).await?;
    }
    let pod = Netlink::open_in(wiring.netns)?;
    if pod.find_link(wiring.ifname).await?.is_some() {
        let name = wiring.ifname;
        return Err(Error::Broken(format!("the pod's namespace already has a device {name}")));
    }
    let host_mac = mac_of(wiring.host_device);
    let pod_mac = mac_of(&format!("{}/{}", wiring.host_device, wiring.ifname));
    node.add_veth((wiring.host_device, host_mac), (wiring.ifname, pod_mac), wiring.netns, wiring.mtu).await?;
    let made = set_up_ends(node, &pod, wiring, &host_mac, &pod_mac).await;
    if made.is_err()
        && let Ok(Some(link)) = node.find_link(wiring.host_device).await
        && let Err(error) = node.delete_link(link.index).await
    {
        tracing::warn!(device = wiring.host_device, %error, "device of a failed wiring could not be removed");
    }
    made
}

async fn set_up_ends(
    node: &Netlink,
    pod: &Netlink,
    wiring: &PodWiring<'_>,
    host_mac: &[u8; 6],
    pod_mac: &[u8; 6],
) -> Result<Wired, Error> {
    let host = node.link(wiring.host_device).await?;
    let inner = pod.link(wiring.ifname).await?;
    run_in(wiring.netns, || pod_sysctls(wiring.ifname, wiring.v6.is_some()))??;
    host_sysctls(wiring.host_device)?;
    pod.set_up(LOOPBACK).await?;
    pod.set_up(inner.index).await?;
    for address in wiring.addresses() {
        let whole = if address.is_ipv4() { 32 } else { 128 };
        pod.add_address(inner.index, address, whole).await?;
        let gateway = gateway(address);
        pod.set_neighbour(inner.index, gateway, host_mac).await?;
        pod.set_route(default_route(gateway, inner.index), "default").await?;
        node.set_neighbour(host.index, address, pod_mac).await?;
    }
    Ok(Wired { host, pod: pod.link(wiring.ifname).await? })
}

fn default_route(gateway: IpAddr, device: u32) -> netlink_packet_route::route::RouteMessage {
    let everything = match gateway {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    };
    let builder = route_to(everything).output_interface(device).onlink();
    match builder.clone().gateway(gateway) {
        Ok(with_gateway) => with_gateway.build(),
        // Only for a gateway of another family than the destination, which is derived from it above.
        Err(_) => builder.build(),
    }
}

fn pod_sysctls(ifname: &str, v6: bool) -> Result<(), Error> {
    if v6 {
        // Container runtimes often leave IPv6 off in new namespaces.
        for device in ["all", "default", "lo", ifname] {
            sysctl::set_if_present(&format!("ipv6/conf/{device}/disable_ipv6"), "0")?;
        }
    }
    sysctl::set_if_present(&format!("ipv6/conf/{ifname}/accept_dad"), "0")?;
    sysctl::set_if_present(&format!("ipv6/conf/{ifname}/accept_ra"), "0")
}

fn host_sysctls(device: &str) -> Result<(), Error> {
    sysctl::set_if_present(&format!("ipv6/conf/{device}/accept_ra"), "0")?;
    sysctl::set_if_present(&format!("ipv6/conf/{device}/accept_dad"), "0")?;
    sysctl::set(&format!("ipv4/conf/{device}/forwarding"), "1")?;
    sysctl::set_if_present(&format!("ipv6/conf/{device}/forwarding"), "1")
}

/// Lets packets pass: brings the node's end up, routes the pod's addresses to it, and waits until both ends have seen it:
/// the kernel tells them a little later, and drops what is sent before.
///
/// # Errors
/// The first step the kernel refused.
pub async fn activate(node: &Netlink, netns: BorrowedFd<'_>, wired: &Wired, addresses: &[IpAddr]) -> Result<(), Error> {
    node.set_up(wired.host.index).await?;
    for address in addresses {
        let route = route_to(IpNet::from(*address)).output_interface(wired.host.index).scope(RouteScope::Link);
        node.set_route(route.build(), &format!("{address} dev {}", wired.host.name)).await?;
        // Down and up again would have flushed it; setting it twice is harmless.
        node.set_neighbour(wired.host.index, *address, &wired.pod.mac).await?;
    }
    let pod = Netlink::open_in(netns)?;
    for (end, name) in [(&pod, &wired.pod.name), (node, &wired.host.name)] {
        // A second at most: it is a courtesy to the pod's first packet, not a condition.
        for _ in 0..CARRIER_LOOKS {
            if end.link(name).await?.operational {
                break;
            }
            tokio::time::sleep(CARRIER_PAUSE).await;
        }
    }
    Ok(())
}

/// Removes the pair (and with it addresses, routes and neighbours); nothing there is fine.
///
/// # Errors
/// If the kernel refuses.
pub async fn unwire(node: &Netlink, host_device: &str) -> Result<(), Error> {
    match node.find_link(host_device).await? {
        Some(link) => node.delete_link(link.index).await,
        None => Ok(()),
    }
}

/// The pod's device as seen inside its namespace; None if it has none of that name.
///
/// # Errors
/// If the namespace cannot be entered.
pub async fn pod_link(netns: BorrowedFd<'_>, ifname: &str) -> Result<Option<Link>, Error> {
    Netlink::open_in(netns)?.find_link(ifname).await
}

/// Whether everything [`wire`] and [`activate`] made is still there.
///
/// # Errors
/// [`Error::Broken`] naming the first thing that is missing or different.
pub async fn check(node: &Netlink, wiring: &PodWiring<'_>) -> Result<(), Error> {
    let broken = |text: String| Err(Error::Broken(text));
    let pod = Netlink::open_in(wiring.netns)?;
    let Some(inner) = pod.find_link(wiring.ifname).await? else {
        return broken(format!("device {} is missing in the pod", wiring.ifname));
    };
    let Some(host) = node.find_link(wiring.host_device).await? else {
        return broken(format!("device {} is missing on the node", wiring.host_device));
    };
    for (link, place) in [(&inner, "pod"), (&host, "node")] {
        if !link.up {
            return broken(format!("device {} on the {place} is down", link.name));
        }
    }
    if inner.peer_index != host.index {
        return broken(format!("device {} in the pod is not paired with {}", inner.name, host.name));
    }
    let found = pod.addresses(inner.index).await?;
    for address in wiring.addresses() {
        if !found.contains(&address) {
            return broken(format!("address {address} is missing on device {} in the pod", inner.name));
        }
    }
    let routes = node.own_routes().await?;
    for address in wiring.addresses() {
        let routed = routes.iter().any(|route| {
            crate::netlink::destination_of(route) == Some(IpNet::from(address))
                && crate::netlink::device_of(route) == Some(host.index)
        });
        if !routed {
            return broken(format!("the node has no route to {address} over device {}", host.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
