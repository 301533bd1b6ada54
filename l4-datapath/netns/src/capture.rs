//! What capture needs inside a pod's namespace: two marks, each with a rule and a table that leads to loopback.
//!
//! - `mark::CAPTURE` (set by the connect hook on captured sockets) -> table 101 -> `local default dev lo src POD_IP`:
//!   the SYN comes in on lo and `sk_lookup` hands it to the outbound listener. The `src` is necessary, else the
//!   socket's source becomes the address it connects to.
//! - `mark::TO_APP` (set by the proxy on its hop to the application, whose source is the true client) -> table 100:
//!   the application's answers come back over lo; `tcp_fwmark_accept` makes accepted sockets inherit the mark.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::route::{RouteMessage, RouteScope, RouteType};
use strata_abi::mark;

use crate::netlink::route_to;
use crate::{Error, Netlink, run_in, sysctl};

/// Table and rule priority of the proxy's hop to the application.
const TO_APP: u32 = 100;
/// Table and rule priority of captured connections.
const CAPTURE: u32 = 101;
/// Index of the loopback device in every namespace.
const LOOPBACK: u32 = 1;

/// The pod's addresses; families it lacks are left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capture {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl Capture {
    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from))
    }
}

/// Sets rules, routes and sysctl; doing it again changes nothing.
///
/// # Errors
/// The first step the kernel refused.
pub async fn enable_capture(netns: BorrowedFd<'_>, pod: &Capture) -> Result<(), Error> {
    let netlink = Netlink::open_in(netns)?;
    netlink.set_up(LOOPBACK).await?;
    for address in pod.addresses() {
        let v6 = address.is_ipv6();
        // Routes before rules: a rule into an empty table would fall through to the main table.
        netlink.set_route(local_default(address, TO_APP), "local default table 100").await?;
        netlink.set_route(local_default(address, CAPTURE), "local default table 101").await?;
        netlink.add_mark_rule(v6, mark::TO_APP, TO_APP, TO_APP).await?;
        netlink.add_mark_rule(v6, mark::CAPTURE, CAPTURE, CAPTURE).await?;
    }
    run_in(netns, || capture_sysctls("1"))?
}

/// Takes back what [`enable_capture`] did. Connections still captured break: let the proxy drain first.
///
/// # Errors
/// The first step the kernel refused.
pub async fn disable_capture(netns: BorrowedFd<'_>, pod: &Capture) -> Result<(), Error> {
    let netlink = Netlink::open_in(netns)?;
    for address in pod.addresses() {
        let v6 = address.is_ipv6();
        netlink.delete_mark_rules(v6, mark::CAPTURE, CAPTURE).await?;
        netlink.delete_mark_rules(v6, mark::TO_APP, TO_APP).await?;
        netlink.delete_route(local_default(address, CAPTURE), "local default table 101").await?;
        netlink.delete_route(local_default(address, TO_APP), "local default table 100").await?;
    }
    run_in(netns, || capture_sysctls("0"))?
}

/// An accepted socket answers with the mark its SYN came with; connections that wait at a proxy's listener when that
/// closes move to its successor's (Linux 5.14; before, they are reset).
fn capture_sysctls(value: &str) -> Result<(), Error> {
    sysctl::set("ipv4/tcp_fwmark_accept", value)?;
    sysctl::set_if_present("ipv4/tcp_migrate_req", value)
}

fn local_default(address: IpAddr, table: u32) -> RouteMessage {
    let everything = match address {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    };
    let builder =
        route_to(everything).table_id(table).kind(RouteType::Local).scope(RouteScope::Host).output_interface(LOOPBACK);
    if table != CAPTURE {
        return builder.build();
    }
    match builder.clone().pref_source(address) {
        Ok(with_source) => with_source.build(),
        // Only for an address of another family than the destination, which is derived from it above.
        Err(_) => builder.build(),
    }
}
