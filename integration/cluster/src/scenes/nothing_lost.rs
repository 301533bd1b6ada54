//! Everything is restarted once, under 200 requests a second.
use std::time::Duration;

use strata_lab::{Call, Result, Running};

use super::Own;
use super::act::Act;
use crate::SYSTEM;

pub(super) const SCENE: Own = Own {
    number: 14,
    title: "Nothing lost: rollouts, a drained node, a new root, no API server, no istiod",
    expect: "under 200 requests a second (half over kept connections, half over new ones) the application, the agents, the \
             node proxies, the waypoint and istiod are rolled out anew, a node is drained, the mesh gets a new root, the API \
             server is away for a minute and istiod for a minute while pods come and go: no request fails",
    play,
};

/// Everybody whom istiod configures here.
const PROXIES: [&str; 3] = ["proxy-node-a", "proxy-node-b", "shop/waypoint"];
/// For a rollout of the larger ones.
const ROLLOUT: Duration = Duration::from_secs(180);
/// After a change, so that what it broke is seen.
const AFTER: Duration = Duration::from_secs(4);
/// Connections that are kept.
const KEPT: u64 = 4;
const ORDERS: &str = "http://orders.shop:80/";

fn play(act: &mut Act<'_>) -> Result<()> {
    act.governed()?;
    act.place("cluster/orders")?;
    act.kubectl().rolled_out("shop", "deployment/orders", ROLLOUT)?;
    act.wait("orders to answer through the waypoint", |act| {
        let call = act.call("shop/checkout-1", &format!("{ORDERS} --count 20 --new-connection --timeout 2s"))?;
        Ok(call.ok == 20)
    })?;
    for (what, namespace, object) in [
        ("the application", "shop", "deployment/orders"),
        ("the agents", SYSTEM, "daemonset/strata-agent"),
        ("the node proxies", SYSTEM, "daemonset/ztunnel"),
        ("the waypoint", "shop", "deployment/waypoint"),
        ("istiod", SYSTEM, "deployment/istiod"),
    ] {
        restarted(act, what, namespace, object)?;
    }
    drained(act)?;
    new_root(act)?;
    without_istiod(act)?;
    without_api_server(act)
}

/// 100 requests a second over kept connections, 100 over new ones.
fn traffic(act: &Act<'_>) -> Result<[Running; 2]> {
    let flags = format!("--count 0 --rate 100 --concurrency {KEPT} --timeout 5s");
    let kept = act.spawn("shop/checkout-1", &format!("{ORDERS} {flags}"))?;
    let fresh = act.spawn("shop/checkout-1", &format!("{ORDERS} {flags} --new-connection"))?;
    Ok([kept, fresh])
}

fn judge(act: &mut Act<'_>, what: &str, running: [Running; 2]) -> Result<()> {
    for (name, running) in ["kept connections", "new connections"].into_iter().zip(running) {
        let call: Call = running.finish()?;
        let detail = format!("{what}, {name}: {}", call.brief());
        // A node proxy carries bytes and cannot tell a client that a kept connection ends: the request that meets its end
        // may fail, one for each of them at most (docs/limits.md).
        let (most, promise) = match (name, what) {
            ("kept connections", "the node proxies rolled out" | "a new root") => {
                (KEPT, "at most one request each fails")
            }
            _ => (0, "no request fails"),
        };
        let ok = call.failed() <= most && call.sent > 200;
        act.check_measured(&format!("{what}: over {name} {promise}"), ok, detail);
    }
    Ok(())
}

fn restarted(act: &mut Act<'_>, what: &str, namespace: &str, object: &str) -> Result<()> {
    act.type_this(format!("kubectl rollout restart -n {namespace} {object}"));
    let running = traffic(act)?;
    std::thread::sleep(Duration::from_secs(1));
    act.kubectl().words(&format!("rollout restart -n {namespace} {object}"))?;
    act.kubectl().rolled_out(namespace, object, ROLLOUT)?;
    std::thread::sleep(AFTER);
    judge(act, &format!("{what} rolled out"), running)
}

fn drained(act: &mut Act<'_>) -> Result<()> {
    // Only the application's pods: the shop's others are bare pods, which nobody would bring back.
    let drain = "drain node-b --pod-selector app=orders --delete-emptydir-data --timeout=60s";
    act.type_this(format!("kubectl {drain}"));
    let running = traffic(act)?;
    std::thread::sleep(Duration::from_secs(1));
    let drained = act.kubectl().words(drain);
    std::thread::sleep(AFTER);
    act.kubectl().words("uncordon node-b")?;
    drained?;
    judge(act, "node-b drained", running)
}

/// The mesh's root is replaced, in the order Istio's documentation gives: both trusted, the new one signs, the old one is
/// trusted no more. Certificates live for a day: those who hold one of the old CA are restarted before it goes.
fn new_root(act: &mut Act<'_>) -> Result<()> {
    act.type_this(
        "Secret istio-system/cacerts: the next root beside the present one; the next one signs; the old one goes",
    );
    let running = traffic(act)?;
    let old = chains(act)?;
    act.cluster.script("ca.sh", &["add"])?;
    act.wait("both roots to be trusted", |act| Ok(chains(act)?.iter().all(|chain| chain.roots == 2)))?;
    let before = reloads(act)?;
    act.cluster.script("ca.sh", &["switch"])?;
    act.wait("istiod to sign by the next CA", |act| Ok(reloads(act)? > before))?;
    for (namespace, object) in [(SYSTEM, "daemonset/ztunnel"), ("shop", "deployment/waypoint")] {
        act.kubectl().words(&format!("rollout restart -n {namespace} {object}"))?;
        act.kubectl().rolled_out(namespace, object, ROLLOUT)?;
    }
    act.wait("certificates by the next CA everywhere", |act| {
        Ok(chains(act)?.iter().all(|chain| old.iter().all(|old| old.signer != chain.signer)))
    })?;
    act.cluster.script("ca.sh", &["drop"])?;
    act.wait("the old root to be gone", |act| Ok(chains(act)?.iter().all(|chain| chain.roots == 1)))?;
    std::thread::sleep(AFTER);
    judge(act, "a new root", running)
}

/// How often istiod has taken over another CA.
fn reloads(act: &Act<'_>) -> Result<usize> {
    let log = act.kubectl().words(&format!("logs -n {SYSTEM} deployment/istiod"))?;
    Ok(log.matches("detected the newly added intermediate CA").count())
}

/// Of one certificate in use: who signed it, and how many roots it comes with.
#[derive(Debug)]
struct Chain {
    signer: String,
    roots: usize,
}

/// Of every identity on both nodes and of the waypoint.
fn chains(act: &Act<'_>) -> Result<Vec<Chain>> {
    let mut all = Vec::new();
    for process in PROXIES {
        let path = if process.starts_with("proxy-") { "/config_dump" } else { "/config_dump/strata" };
        let dump: serde_json::Value =
            serde_json::from_str(&act.cluster.ask(process, path)?).map_err(strata_lab::LabError::other)?;
        for identity in dump["certificates"].as_array().into_iter().flatten() {
            let list = |name: &str| identity[name].as_array().cloned().unwrap_or_default();
            let signer = list("certChain").last().map(|last| last["serialNumber"].to_string()).unwrap_or_default();
            all.push(Chain { signer, roots: list("rootCerts").len() });
        }
    }
    if all.is_empty() {
        return Err(strata_lab::LabError::Other("no process shows a certificate".into()));
    }
    Ok(all)
}

/// How many xDS responses each proxy has had.
fn heard(act: &Act<'_>) -> Result<Vec<u64>> {
    let count = |process: &&str| {
        let metrics = act.cluster.ask(process, "/metrics")?;
        let lines = metrics.lines().filter(|line| line.starts_with("istio_xds_message_total"));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    };
    PROXIES.iter().map(count).collect()
}

/// Pods come and go while nobody configures anything; the proxies serve what they know, and the new pods once it is back.
fn without_istiod(act: &mut Act<'_>) -> Result<()> {
    act.type_this(format!("kubectl scale -n {SYSTEM} deployment/istiod --replicas=0; sleep 60; ... --replicas=1"));
    let running = traffic(act)?;
    let scale = |act: &Act<'_>, object: &str, replicas: u32| {
        let namespace = if object.ends_with("istiod") { SYSTEM } else { "shop" };
        act.kubectl().words(&format!("scale -n {namespace} {object} --replicas={replicas}"))
    };
    // Autoscaling would bring it back.
    act.kubectl().words(&format!("delete hpa -n {SYSTEM} istiod --ignore-not-found"))?;
    scale(act, "deployment/istiod", 0)?;
    std::thread::sleep(Duration::from_secs(20));
    scale(act, "deployment/orders", 5)?;
    std::thread::sleep(Duration::from_secs(20));
    let before = heard(act)?;
    scale(act, "deployment/istiod", 1)?;
    act.kubectl().rolled_out(SYSTEM, "deployment/istiod", ROLLOUT)?;
    // They try again every 5 s at the latest. What comes next is about something else.
    act.wait("the proxies to hear from istiod again", |act| {
        Ok(heard(act)?.iter().zip(&before).all(|(now, before)| now > before))
    })?;
    act.kubectl().rolled_out("shop", "deployment/orders", ROLLOUT)?;
    std::thread::sleep(AFTER);
    scale(act, "deployment/orders", 3)?;
    std::thread::sleep(AFTER);
    judge(act, "istiod away, pods coming and going", running)
}

/// kubectl needs the API server too: the traffic runs as a pod and is asked for its report afterwards.
fn without_api_server(act: &mut Act<'_>) -> Result<()> {
    act.type_this("stop the API server for a minute");
    act.place("cluster/load")?;
    act.wait("the load to run", |act| Ok(act.kubectl().get("pod -n shop load")?["status"]["phase"] == "Running"))?;
    act.cluster.script("down.sh", &["apiserver"])?;
    std::thread::sleep(Duration::from_secs(60));
    act.cluster.script("up.sh", &[])?;
    act.kubectl().wait("the API server", super::act::PATIENCE, |kubectl| {
        kubectl.words("get --raw /readyz").map(|text| text == "ok")
    })?;
    act.wait("the load to end", |act| Ok(act.kubectl().get("pod -n shop load")?["status"]["phase"] == "Succeeded"))?;
    let text = act.kubectl().words("logs -n shop load")?;
    let call: Call = serde_json::from_str(text.trim()).map_err(strata_lab::LabError::other)?;
    let ok = call.failed() == 0 && call.sent > 5000;
    act.check_measured("without an API server no request fails", ok, format!("API server away: {}", call.brief()));
    // A change made afterwards comes into force.
    act.place("scenes/policy")?;
    act.wait("a policy made afterwards", |act| {
        Ok(act.call("shop/frontend-1", "http://payments.shop/ --timeout 1s")?.ok == 0)
    })?;
    act.remove("scenes/policy")
}
