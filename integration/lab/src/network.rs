//! The wires: nodes, the link between them, and the world outside the cluster.
use std::fs;
use std::net::IpAddr;

use compat_objects::{HasMeta, ObjectSet};

use crate::error::Doing;
use crate::paths::Paths;
use crate::{LabError, Result, sys};

/// Device of a node that leads to the other nodes.
pub(crate) const UPLINK: &str = "uplink";
/// The network outside the cluster: the bank's gateway and the token issuer live there.
pub const WORLD_GATEWAY: &str = "203.0.113.10";
/// Address of the token issuer.
pub const WORLD_ISSUER: &str = "203.0.113.20";

/// A node as its object describes it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

/// The nodes of the sources, in the order of their names.
///
/// # Errors
/// If they are not two, or one has no internal IPv4 address.
pub(crate) fn nodes(objects: &ObjectSet) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for node in objects.nodes() {
        let addresses: Vec<IpAddr> =
            compat_objects::internal_addresses(node).filter_map(|address| address.parse().ok()).collect();
        if !addresses.iter().any(IpAddr::is_ipv4) {
            let text = format!("Node {}: status.addresses needs an IPv4 address of type InternalIP", node.name());
            return Err(LabError::Other(text));
        }
        nodes.push(Node { name: node.name().to_owned(), addresses });
    }
    if nodes.len() != 2 {
        let text = format!("the folder describes {} Node objects, the lab builds exactly two", nodes.len());
        return Err(LabError::Other(text));
    }
    Ok(nodes)
}

/// Makes a namespace with its loopback device up.
pub(crate) fn make_namespace(paths: &Paths, what: &str) -> Result<()> {
    let name = paths.netns_name(what);
    sys::ip(&format!("netns add {name}"))?;
    sys::ip(&format!("-n {name} link set lo up"))?;
    Ok(())
}

fn set(paths: &Paths, what: &str, settings: &[(&str, &str)]) -> Result<()> {
    let write = || {
        for (name, value) in settings {
            fs::write(format!("/proc/sys/net/{name}"), value)?;
        }
        Ok(())
    };
    sys::in_netns(&paths.netns(what), write).doing(format!("settings of {what}"))
}

/// Node namespaces with their addresses, joined by a veth pair.
pub(crate) fn make_nodes(paths: &Paths, nodes: &[Node]) -> Result<()> {
    for node in nodes {
        make_namespace(paths, &node.name)?;
        // New namespaces do not forward (a router must be told to).
        let forward = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
        set(paths, &node.name, &forward)?;
    }
    let (a, b) = (paths.netns_name(&nodes[0].name), paths.netns_name(&nodes[1].name));
    sys::ip(&format!("-n {a} link add {UPLINK} type veth peer name {UPLINK} netns {b}"))?;
    for node in nodes {
        let name = paths.netns_name(&node.name);
        for address in &node.addresses {
            let (prefix, flags) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
            sys::ip(&format!("-n {name} addr add {address}/{prefix} dev {UPLINK} {flags}"))?;
        }
        sys::ip(&format!("-n {name} link set {UPLINK} up"))?;
    }
    Ok(())
}

/// A namespace behind the second node that is no part of the cluster.
pub(crate) fn make_world(paths: &Paths, nodes: &[Node]) -> Result<()> {
    make_namespace(paths, "world")?;
    let (world, near, far) =
        (paths.netns_name("world"), paths.netns_name(&nodes[1].name), paths.netns_name(&nodes[0].name));
    sys::ip(&format!("-n {near} link add world type veth peer name eth0 netns {world}"))?;
    sys::ip(&format!("-n {near} addr add 203.0.113.1/24 dev world"))?;
    sys::ip(&format!("-n {near} link set world up"))?;
    for address in [WORLD_GATEWAY, WORLD_ISSUER] {
        sys::ip(&format!("-n {world} addr add {address}/24 dev eth0"))?;
    }
    sys::ip(&format!("-n {world} link set eth0 up"))?;
    sys::ip(&format!("-n {world} route add default via 203.0.113.1"))?;
    let via = nodes[1].addresses.iter().find(|address| address.is_ipv4());
    let via = via.ok_or_else(|| LabError::other("the second node has no IPv4 address"))?;
    sys::ip(&format!("-n {far} route add 203.0.113.0/24 via {via}"))?;
    Ok(())
}
