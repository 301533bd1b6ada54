//! Scene 1: services without a proxy, without NAT, without conntrack.
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::Scene;
use super::stage::{EMPTY, PAYMENTS, PAYMENTS_V6, Stage};
use crate::Result;

pub(super) const SCENE: Scene = Scene {
    number: 1,
    title: "Service access at connect(), before any mesh",
    expect: "ClusterIPs work over TCP and UDP, IPv4, IPv6 and v4-mapped sockets, on one node and across nodes; \
             getpeername() shows the VIP, the server sees the true client, nothing is translated on the way; \
             a service without endpoints refuses at once",
    play,
};

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.unmeshed()?;
    stage.type_this(format!("in frontend-1: strata-echo connect {PAYMENTS}:9090 --say WHO"));
    let mapped = format!("[::ffff:{PAYMENTS}]");
    let client = BTreeSet::from([stage.ip("frontend-1", false)?, stage.ip("frontend-1", true)?]);
    let (v4, v6) = (PAYMENTS.to_owned(), format!("[{PAYMENTS_V6}]"));
    let ways = [
        ("TCP over IPv4", &v4, ""),
        ("TCP over IPv6", &v6, ""),
        ("TCP, v4-mapped socket", &mapped, ""),
        ("connected UDP over IPv4", &v4, "--udp"),
        ("connected UDP over IPv6", &v6, "--udp"),
        ("connected UDP, v4-mapped socket", &mapped, "--udp"),
        ("unconnected UDP over IPv4", &v4, "--udp --unconnected"),
        ("unconnected UDP over IPv6", &v6, "--udp --unconnected"),
        ("unconnected UDP, v4-mapped socket", &mapped, "--udp --unconnected"),
    ];
    for (name, host, flags) in ways {
        let seen = attempts(stage, &format!("{host}:9090"), flags, &client)?;
        let ok = seen.wrong.is_none() && seen.servers.len() > 1;
        let detail = match &seen.wrong {
            Some(wrong) => format!("{name}: {wrong}"),
            None => format!("{name}: {} saw {}; getpeername {host}:9090", seen.servers.join(" and "), seen.at_server),
        };
        stage.check_measured(
            &format!("{name}: one node and across; VIP to the client, true client to the server"),
            ok,
            detail,
        );
    }
    everywhere(stage)?;
    no_translation(stage)?;
    refusals(stage)
}

/// What several connections of one kind showed.
#[derive(Default)]
struct Seen {
    /// One of each node.
    servers: Vec<String>,
    at_server: String,
    /// The first thing that was not as it has to be.
    wrong: Option<String>,
}

/// Connects until a server of each node has answered. A node that has a third of the endpoints is missed in forty
/// attempts once in ten million.
fn attempts(stage: &Stage<'_>, target: &str, flags: &str, client: &BTreeSet<IpAddr>) -> Result<Seen> {
    let mut all = Seen::default();
    for _ in 0..40 {
        let seen = stage.connect("frontend-1", &format!("{target} --say WHO {flags}"))?;
        let (server, peer) = (seen.replied("name"), seen.peer.clone().unwrap_or_default());
        all.at_server = seen.replied("peer");
        let from = all.at_server.parse::<SocketAddr>().map(|address| address.ip());
        if !seen.ok {
            all.wrong = Some(seen.error.unwrap_or_default());
        } else if peer != target {
            all.wrong = Some(format!("getpeername shows {peer}, not {target}"));
        } else if !from.is_ok_and(|ip| client.contains(&ip)) {
            all.wrong = Some(format!("{server} saw {} instead of {client:?}", all.at_server));
        }
        let node = server.chars().last();
        if !all.servers.iter().any(|known| known.chars().last() == node) {
            all.servers.push(server);
        }
        if all.wrong.is_some() || all.servers.len() > 1 {
            break;
        }
    }
    Ok(all)
}

/// All endpoints, on both nodes, take part.
fn everywhere(stage: &mut Stage<'_>) -> Result<()> {
    for host in [PAYMENTS.to_owned(), format!("[{PAYMENTS_V6}]")] {
        let call = stage.call("frontend-1", &format!("http://{host}/ --count 90 --new-connection"))?;
        let servers = ["payments-v1-a", "payments-v1-b", "payments-v2-b"];
        let all = servers.iter().all(|name| call.servers.get(*name).is_some_and(|count| *count > 0));
        let detail = format!("90 connections to {host}: {:?}; {}", call.servers, call.brief());
        stage.check_measured("every endpoint takes its part", all && call.ok == 90, detail);
    }
    Ok(())
}

/// Neither node tracks connections between pods or to services, or has NAT rules for them. What enters or leaves the
/// cluster is another matter (docs/adr/0012).
fn no_translation(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("on a node: cat /proc/net/nf_conntrack /proc/net/ip_tables_names");
    for node in ["node-a", "node-b"] {
        // From a pod to a pod or a service, as pods are numbered in the lab (10.8, fd00:8) and on the test cluster (10.88,
        // fd00:88). Without the modules the files are missing, which is as good as empty.
        let script = "grep -E 'src=(10\\.8+\\.|fd00:00[08]8:)[^ ]+ dst=(10\\.(8+|96)\\.|fd00:00([08]8|96):)' \
                          /proc/net/nf_conntrack 2>/dev/null | wc -l; \
                      cat /proc/net/ip_tables_names /proc/net/ip6_tables_names 2>/dev/null | wc -l";
        let counts = stage.on_node(node, &["sh", "-c", script])?;
        let counts: Vec<&str> = counts.split_whitespace().collect();
        let detail = format!("{node}: entries between pods or to services, iptables tables: {}", counts.join(", "));
        stage.check_measured(
            &format!("{node} tracks no connection between pods or to services, and has no table of rules"),
            counts == ["0", "0"],
            detail,
        );
    }
    Ok(())
}

fn refusals(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this(format!("in frontend-1: strata-echo connect {EMPTY}:80"));
    for (what, target) in [
        ("a service without endpoints", format!("{EMPTY}:80")),
        ("a port the service does not have", format!("{PAYMENTS}:81")),
    ] {
        let seen = stage.connect("frontend-1", &target)?;
        let error = seen.error.unwrap_or_else(|| "connected".to_owned());
        // No answer is waited for: the refusal comes from connect() itself. Far above any scheduling delay, far
        // below the second after which TCP would try again.
        let ok = error == "ECONNREFUSED" && seen.took_ms < 500.0;
        stage.check_measured(
            &format!("{what} refuses at once"),
            ok,
            format!("{what}: {error} after {:.2} ms", seen.took_ms),
        );
    }
    Ok(())
}
