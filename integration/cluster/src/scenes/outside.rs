//! Callers outside the cluster, and pods that call there.
use std::collections::BTreeSet;

use strata_lab::{Call, Result, WORLD_GATEWAY};

use super::Own;
use super::act::Act;
use crate::MACHINE;

pub(super) const SCENE: Own = Own {
    number: 18,
    title: "In from outside, and out",
    expect: "a caller outside the cluster reaches payments at a NodePort of every node, with its own address where the pod is the \
             node's own; with externalTrafficPolicy Local each node leads to its own pods only; pods use NodePorts and hostPorts \
             too, meshed ones as well, under STRICT; what pods send outside comes from their node's address",
    play,
};

/// The nodes, their addresses, and the pods of payments on each.
const NODES: [(&str, &str, &[&str]); 2] =
    [("node-a", "10.99.0.11", &["payments-v1-a"]), ("node-b", "10.99.0.12", &["payments-v1-b", "payments-v2-b"])];
const ALL: [&str; 3] = ["payments-v1-a", "payments-v1-b", "payments-v2-b"];

fn play(act: &mut Act<'_>) -> Result<()> {
    act.place("cluster/node-port")?;
    act.wait("the NodePort to answer", |act| {
        let both =
            NODES.iter().map(|(_, address, _)| act.cluster.call_from_outside(&format!("http://{address}:30080/")));
        Ok(both.collect::<Result<Vec<_>>>()?.iter().all(|call| call.ok == 1))
    })?;
    for (node, address, _) in NODES {
        act.type_this(format!("from outside: curl http://{address}:30080/"));
        let call = act.cluster.call_from_outside(&format!("http://{address}:30080/ --count 60 --new-connection"))?;
        let detail = format!("{node}: {:?}; {}", call.servers, call.brief());
        act.check_measured(
            &format!("{node} leads to every pod of payments"),
            call.ok == 60 && servers(&call) == all(&ALL),
            detail,
        );
    }

    let local = "{\"spec\": {\"externalTrafficPolicy\": \"Local\"}}";
    act.type_this(format!("kubectl patch service -n shop payments-outside -p '{local}'"));
    act.kubectl().run(&["patch", "service", "-n", "shop", "payments-outside", "-p", local])?;
    for (node, address, own) in NODES {
        let url = format!("http://{address}:30080/ --count 20 --new-connection");
        let settled = act
            .wait("each node to lead to its own", |act| Ok(servers(&act.cluster.call_from_outside(&url)?) == all(own)));
        let call = act.cluster.call_from_outside(&url)?;
        let detail = format!("{node}: {:?}; {}", call.servers, call.brief());
        act.check(&format!("{node} leads to its own pods only"), settled.is_ok() && call.ok == 20, detail);
        let peer = peer(&call);
        act.check(&format!("a pod of {node} sees the caller's own address"), peer == MACHINE, peer);
    }

    // From inside it makes no difference whose port is asked.
    let call = act.call("outside/gateway-1", &format!("http://{}:30080/ --count 60 --new-connection", NODES[0].1))?;
    let detail = format!("{:?}; {}", call.servers, call.brief());
    act.check("pods use NodePorts too", call.ok == 60 && servers(&call) == all(&ALL), detail);
    host_port(act)?;

    act.type_this(format!("in outside/gateway-1: curl http://{WORLD_GATEWAY}:8080/"));
    let call = act.call("outside/gateway-1", &format!("http://{WORLD_GATEWAY}:8080/"))?;
    let peer = peer(&call);
    let masqueraded = NODES.iter().any(|(_, address, _)| *address == peer);
    act.check("what pods send outside comes from their node's address", call.ok == 1 && masqueraded, peer);
    Ok(())
}

/// A pod at a port of its node, for callers outside, pods, and pods of the mesh.
fn host_port(act: &mut Act<'_>) -> Result<()> {
    act.place("cluster/host-port")?;
    let url = format!("http://{}:8126/", NODES[1].1);
    act.wait("the hostPort to answer", |act| Ok(act.cluster.call_from_outside(&url)?.ok == 1))?;
    let outside = act.cluster.call_from_outside(&url)?;
    act.check("a caller outside reaches a hostPort", outside.ok == 1, outside.brief());
    act.meshed()?;
    act.place("scenes/strict")?;
    for (pod, kind) in [("outside/gateway-1", "pods"), ("shop/checkout-1", "meshed pods")] {
        let call = act.call(pod, &format!("{url} --count 10 --new-connection --timeout 2s"))?;
        act.check(&format!("{kind} reach the hostPort"), call.ok == 10, format!("from {pod}: {}", call.brief()));
    }
    let url = format!("http://{}:30080/ --count 60 --new-connection --timeout 2s", NODES[0].1);
    let call = act.call("shop/checkout-1", &url)?;
    let detail = format!("{:?}; {}", call.servers, call.brief());
    act.check(
        "meshed pods use NodePorts, with mutual TLS to the pod",
        call.ok == 60 && servers(&call) == all(&ALL),
        detail,
    );
    act.remove("scenes/strict")?;
    act.remove("scenes/ambient")
}

fn all(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn servers(call: &Call) -> BTreeSet<String> {
    call.servers.keys().cloned().collect()
}

/// Whom the server of the last request saw.
fn peer(call: &Call) -> String {
    let peer = call.last.as_ref().and_then(|last| last["body"]["peer"].as_str()).unwrap_or_default();
    peer.rsplit_once(':').map_or(peer, |(ip, _)| ip).trim_matches(['[', ']']).trim_start_matches("::ffff:").to_owned()
}
