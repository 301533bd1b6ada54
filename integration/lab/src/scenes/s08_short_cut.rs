//! Scene 8: two pods of one node talk straight while only L4 policy applies.
use serde::Deserialize;
use serde_json::Value;

use super::Scene;
use super::stage::Stage;
use crate::Result;

pub(super) const SCENE: Scene = Scene {
    number: 8,
    title: "Short-cut",
    expect: "two pods of one node with L4-only policy talk DIRECT in the kernel, about as fast as over plain veth and \
             faster than through the proxy; when L7 is asked for, the grant goes and new connections take the proxy",
    play,
};

/// Which way a connection took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Veth,
    Direct,
    Proxy,
}

/// `strata-echo rr` and `bulk`.
#[derive(Debug, Default, Clone, Copy)]
struct Speed {
    p50_us: f64,
    gbit: f64,
}

#[derive(Debug, Deserialize)]
struct RoundTrips {
    latency_ms: crate::client::Latency,
}

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.unmeshed()?;
    let target = format!("{}:9090", stage.ip("payments-v1-a", false)?);
    stage.type_this(format!("in checkout-1: strata-echo rr {target}; strata-echo bulk {target}"));
    let veth = speed(stage, &target)?;
    stage.meshed()?;
    stage.place("l4-authorization")?;
    // The first connection goes through the proxy, which then grants the short-cut.
    stage.wait("the short-cut to be granted", |stage| {
        let seen = stage.connect("checkout-1", &format!("{target} --say WHO"))?;
        Ok(seen.ok && granted(stage, &target)?)
    })?;
    let (way, direct) = measured(stage, &target)?;
    stage.check("with L4-only policy the connection is DIRECT", way == Some(Way::Direct), format!("{way:?}"));
    let who = stage.connect("checkout-1", &format!("{target} --say WHO"))?;
    let client = stage.ip("checkout-1", false)?;
    let ok = who.replied("peer").starts_with(&format!("{client}:"));
    stage.check("payments sees the true client on it", ok, format!("accept() saw {}", who.replied("peer")));
    refused_without_identity(stage, &target)?;
    revoked(stage, &target, veth, direct)
}

/// The grant is for the pair; another identity is judged by itself.
fn refused_without_identity(stage: &mut Stage<'_>, target: &str) -> Result<()> {
    let seen = stage.connect("frontend-1", &format!("{target} --say WHO --timeout 2s"))?;
    let detail = format!("frontend: {}", seen.error.clone().unwrap_or_else(|| "answered".to_owned()));
    stage.check_measured("an identity the policy does not allow gets no answer", !seen.ok, detail);
    Ok(())
}

fn revoked(stage: &mut Stage<'_>, target: &str, veth: Speed, direct: Speed) -> Result<()> {
    stage.place("waypoint")?;
    let gone = stage.wait("the short-cut to be revoked", |stage| Ok(!granted(stage, target)?));
    stage.check_measured(
        "asking for L7 (a waypoint) revokes the grant",
        gone.is_ok(),
        format!("short-cuts to {target}: gone"),
    );
    let (way, proxied) = measured(stage, target)?;
    stage.check("new connections take the proxy", way == Some(Way::Proxy), format!("{way:?}"));
    for (name, speed) in [("plain veth", veth), ("DIRECT", direct), ("through the proxy", proxied)] {
        stage.measured(format!("{name}: {:.1} us a round trip (median), {:.2} Gbit/s", speed.p50_us, speed.gbit));
    }
    let ratio = direct.p50_us / veth.p50_us;
    let detail =
        format!("DIRECT is {:.2} of plain veth's latency and {:.2} of its throughput", ratio, direct.gbit / veth.gbit);
    // Shown, not checked: latencies on a shared machine say nothing in one run (`make bench` repeats and compares).
    stage.measured(detail);
    Ok(())
}

/// Latency and throughput of new connections, and the way the kernel sent them.
fn measured(stage: &Stage<'_>, target: &str) -> Result<(Option<Way>, Speed)> {
    let before = counters(stage)?;
    let speed = speed(stage, target)?;
    let after = counters(stage)?;
    let way = match (after.0 - before.0, after.1 - before.1) {
        (direct, 0) if direct >= 2 => Some(Way::Direct),
        (0, steered) if steered >= 2 => Some(Way::Proxy),
        (0, 0) => Some(Way::Veth),
        _ => None,
    };
    Ok((way, speed))
}

fn speed(stage: &Stage<'_>, target: &str) -> Result<Speed> {
    let round_trips: RoundTrips = stage.client("checkout-1", "rr", &format!("{target} --count 5000 --size 128"))?;
    let bulk: Value = stage.client("checkout-1", "bulk", &format!("{target} --duration 1500ms"))?;
    Ok(Speed { p50_us: round_trips.latency_ms.p50 * 1e3, gbit: bulk["gbit_per_second"].as_f64().unwrap_or(0.0) })
}

/// Connects sent straight and connects steered to the proxy, of all pods of the node.
fn counters(stage: &Stage<'_>) -> Result<(u64, u64)> {
    let status = stage.ground.admin("agent-node-a", "/status")?;
    let at = |key: &str| status["statistics"][key].as_u64().unwrap_or(0);
    Ok((at("connect_direct"), at("connect_steered")))
}

/// Whether checkout has a short-cut there, as the kernel's map says.
fn granted(stage: &Stage<'_>, target: &str) -> Result<bool> {
    let source = stage.ip("checkout-1", false)?.to_string();
    let dump = stage.ground.admin("agent-node-a", "/config_dump")?;
    let mut grants = dump["grants"].as_array().into_iter().flatten();
    Ok(grants.any(|grant| {
        let to = format!("{}:{}", grant["dst"].as_str().unwrap_or_default(), grant["port"]);
        grant["src"] == source.as_str() && to == target && grant["in_force"] == true
    }))
}
