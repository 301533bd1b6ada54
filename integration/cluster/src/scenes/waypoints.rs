//! Waypoints that come about in other ways, and moving from one to another.
use strata_lab::{LabError, Result};

use super::Own;
use super::act::{Act, PATIENCE};

pub(super) const SCENE: Own = Own {
    number: 15,
    title: "From one waypoint to another, bit by bit",
    expect: "a second waypoint, made by istiod with a patch of ours, takes a share of payments' connections by Istio's canary \
             label and weight, then all of them; a third whose Deployment is our own is adopted and takes over",
    play,
};

/// Label of a waypoint's pods.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Connections of one measurement: rounds, and connections in each.
const ROUNDS: u64 = 6;
const CALLS: u64 = 50;

fn play(act: &mut Act<'_>) -> Result<()> {
    act.governed()?;
    act.place("cluster/waypoint-canary")?;
    ready(act, "canary")?;
    share(act, "before any weight", "/none", 0.0)?;
    payments(act, "waypoint", "istio.io/use-waypoint-canary: canary", "30")?;
    share(act, "with weight 30", "/thirty", 0.3)?;
    payments(act, "waypoint", "istio.io/use-waypoint-canary: canary", "100")?;
    share(act, "with weight 100", "/hundred", 1.0)?;
    act.place("cluster/waypoint-by-hand")?;
    ready(act, "handmade")?;
    payments(act, "handmade", "istio.io/waypoint-for: service", "0")?;
    let arrived = act.wait("requests to go through the third", |act| {
        act.call("shop/checkout-1", "http://payments.shop/third --count 5 --timeout 2s")?;
        Ok(seen(act, "handmade", "/third")? > 0)
    });
    let call = act.call("shop/checkout-1", "http://payments.shop/governed --count 50 --new-connection --timeout 2s")?;
    let through = seen(act, "handmade", "/governed")?;
    let detail = format!("by hand: {} of {} answered, {through} seen by it", call.ok, call.sent);
    act.check_measured(
        "a waypoint deployed by hand is adopted and governs",
        arrived.is_ok() && call.ok == 50 && through == 50,
        detail,
    );
    Ok(())
}

fn ready(act: &mut Act<'_>, gateway: &str) -> Result<()> {
    act.wait(&format!("istiod to know {gateway}"), |act| {
        let found = act.kubectl().get(&format!("gateways.gateway.networking.k8s.io -n shop {gateway}"))?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        match conditions.iter().find(|condition| condition["type"] == "Programmed") {
            Some(programmed) if programmed["status"] == "True" => Ok(true),
            programmed => Err(LabError::Other(format!("Programmed is {programmed:?}"))),
        }
    })?;
    act.kubectl().rolled_out("shop", &format!("deployment/{gateway}"), PATIENCE)?;
    let deployment = act.kubectl().get(&format!("deployment -n shop {gateway}"))?;
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let image = container["image"].as_str().unwrap_or_default().to_owned();
    act.check(&format!("{gateway} runs our image"), image.contains("strata.io/proxy"), image);
    if gateway == "canary" {
        let limit = container["resources"]["limits"]["memory"].to_string();
        act.check("istiod made the canary by our patch", limit == "\"512Mi\"", limit);
    }
    Ok(())
}

/// Which waypoints payments has.
fn payments(act: &mut Act<'_>, waypoint: &str, label: &str, weight: &str) -> Result<()> {
    act.type_this(format!(
        "kubectl label service -n shop payments istio.io/use-waypoint={waypoint} {}; kubectl annotate ... weight={weight}",
        label.replace(": ", "=")
    ));
    act.write(
        "payments-waypoints",
        &format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: payments\n  namespace: shop\n  labels: {{istio.io/use-waypoint: {waypoint}, {label}}}\n  annotations: {{istio.io/use-waypoint-canary-weight: \"{weight}\"}}\n"
        ),
    )
}

/// The canary's share of connections, and that none is lost or ungoverned.
fn share(act: &mut Act<'_>, what: &str, path: &str, expected: f64) -> Result<()> {
    if expected > 0.0 {
        // In force once the canary sees some, and the other none where all go to the canary.
        let probe = format!("http://payments.shop{path}-probe --count 20 --new-connection --timeout 2s");
        act.wait(what, |act| {
            let before = seen(act, "waypoint", &format!("{path}-probe"))?;
            act.call("shop/checkout-1", &probe)?;
            let first = seen(act, "waypoint", &format!("{path}-probe"))? - before;
            Ok(if expected < 1.0 { first < 20 } else { first == 0 })
        })?;
    }
    let total = ROUNDS * CALLS;
    let (mut answered, mut first, mut canary) = (0, 0, 0);
    for round in 0..ROUNDS {
        let path = format!("{path}-{round}");
        let url = format!("http://payments.shop{path} --count {CALLS} --new-connection --timeout 2s");
        answered += act.call("shop/checkout-1", &url)?.ok;
        first += seen(act, "waypoint", &path)?;
        canary += seen(act, "canary", &path)?;
    }
    let detail = format!("{what}: {answered} of {total} answered, {first} through waypoint, {canary} through canary");
    let ok = answered == total && first + canary == total;
    act.check_measured(&format!("{what}: no request is lost or ungoverned"), ok, detail);
    act.check_share(&format!("{what}: the canary's share"), canary, total, expected);
    Ok(())
}

/// Requests for a path that a waypoint has seen, by its access log: its stream of events is thinned out.
fn seen(act: &Act<'_>, gateway: &str, path: &str) -> Result<u64> {
    let logs = act.kubectl().words(&format!("logs -n shop -l {GATEWAY_NAME}={gateway} --tail=-1"))?;
    let request = format!("\"GET {path} ");
    Ok(logs.lines().filter(|line| line.contains(&request)).count() as u64)
}
