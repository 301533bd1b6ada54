//! The node's own namespace: forwarding, and routes to the other nodes' pods.
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::RouteType;

use crate::netlink::{destination_of, device_of, gateway_of, is_unreachable, route_to};
use crate::{Error, Netlink, sysctl};

/// A route of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NodeRoute {
    /// Another node's pods, reached through that node's address, over a device if one is given.
    Via { pods: IpNet, node: IpAddr, device: Option<u32> },
    /// This node's own pods: addresses no pod has are refused instead of sent to the default gateway (which would
    /// send them back).
    Own { pods: IpNet },
}

impl NodeRoute {
    fn pods(&self) -> IpNet {
        match self {
            NodeRoute::Via { pods, .. } | NodeRoute::Own { pods } => *pods,
        }
    }
}

/// Makes the node a router for its pods.
///
/// # Errors
/// The setting the kernel refused.
pub fn prepare_node() -> Result<(), Error> {
    sysctl::set("ipv4/ip_forward", "1")?;
    sysctl::set_if_present("ipv6/conf/all/forwarding", "1")?;
    // Strict reverse-path checks of "all" would override the devices' own: pods' devices are checked by the guard.
    if sysctl::get("ipv4/conf/all/rp_filter")? == "1" {
        sysctl::set("ipv4/conf/all/rp_filter", "2")?;
    }
    Ok(())
}

/// Makes the node's routes to other nodes exactly `wanted`; routes of pods and of others are left alone.
/// Returns how many were added or replaced, and removed.
///
/// # Errors
/// The route the kernel refused (for one, a node address that is not reachable); the others are set all the same
/// and the first error is returned.
pub async fn sync_node_routes(netlink: &Netlink, wanted: &[NodeRoute]) -> Result<(usize, usize), Error> {
    let mut missing: BTreeMap<IpNet, NodeRoute> = wanted.iter().map(|route| (route.pods(), *route)).collect();
    let (mut removed, mut added, mut first_error) = (0, 0, None);
    for route in netlink.own_routes().await? {
        let Some(destination) = destination_of(&route) else { continue };
        let found = match gateway_of(&route) {
            Some(node) => NodeRoute::Via { pods: destination, node, device: device_of(&route) },
            None if is_unreachable(&route) => NodeRoute::Own { pods: destination },
            // A pod's route.
            None => continue,
        };
        match missing.get(&destination) {
            Some(want) if same(want, &found) => {
                missing.remove(&destination);
            }
            _ => {
                netlink.delete_route(route, &destination.to_string()).await?;
                removed += 1;
            }
        }
    }
    for (destination, route) in missing {
        match add(netlink, &route).await {
            Ok(()) => added += 1,
            Err(error) => {
                tracing::warn!(%destination, %error, "route to a node's pods could not be set");
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok((added, removed)), Err)
}

/// A wanted route without a device matches whichever device the kernel chose.
fn same(wanted: &NodeRoute, found: &NodeRoute) -> bool {
    match (wanted, found) {
        (NodeRoute::Via { pods, node, device: None }, NodeRoute::Via { pods: found_pods, node: found_node, .. }) => {
            pods == found_pods && node == found_node
        }
        _ => wanted == found,
    }
}

async fn add(netlink: &Netlink, route: &NodeRoute) -> Result<(), Error> {
    match route {
        NodeRoute::Own { pods } => {
            let message = route_to(*pods).kind(RouteType::Unreachable).build();
            netlink.set_route(message, &format!("unreachable {pods}")).await
        }
        NodeRoute::Via { pods, node, device } => {
            let what = format!("{pods} via {node}");
            let mismatch = || {
                Error::Broken(format!("route {what}: the pods' range and the node's address are of different families"))
            };
            if pods.addr().is_ipv4() != node.is_ipv4() {
                return Err(mismatch());
            }
            let mut builder = route_to(*pods).gateway(*node).map_err(|_| mismatch())?;
            if let Some(device) = device {
                builder = builder.output_interface(*device).onlink();
            }
            netlink.set_route(builder.build(), &what).await
        }
    }
}
