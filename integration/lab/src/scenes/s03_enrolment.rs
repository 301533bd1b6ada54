//! Scene 3: a namespace joins the mesh under running traffic.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::Scene;
use super::capture::{Opening, Segment, contains, opening, record_type};
use super::stage::{PAYMENTS, Stage};
use crate::Result;

pub(super) const SCENE: Scene = Scene {
    number: 3,
    title: "Enrolment: one label, mutual TLS between the nodes",
    expect: "labelling the namespace brings new connections into the mesh and leaves open ones alone; between the nodes \
             only TLS 1.3 on port 15008; payments still sees the true client address; the peer's SPIFFE identity is \
             reported; STRICT refuses a client outside the mesh",
    play,
};

const MARKER: &str = "strata-plaintext-marker-4711";
const HBONE: u16 = 15008;

/// `strata-echo hold`.
#[derive(Debug, Deserialize)]
struct Held {
    answered: u64,
    last_answer_ms: f64,
    interrupted: bool,
    error: Option<String>,
    longest_wait_ms: f64,
}

/// Address and port.
type End = (IpAddr, u16);

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.unmeshed()?;
    camera(stage)?;
    let remote = stage.ip("payments-v1-b", false)?;
    let holding = stage.spawn("checkout-1", "hold", &format!("{remote}:9090 --every 20ms --duration 60s"))?;
    holding.wait_for_log("open", Duration::from_secs(5))?;
    let opened = Instant::now();
    stage.meshed()?;
    let enrolled = opened.elapsed().as_secs_f64() * 1e3;
    let (call, segments) = stage.captured(|stage| {
        let url = format!("http://{PAYMENTS}/{MARKER} --count 60 --new-connection -H x-secret:{MARKER}");
        stage.call("checkout-1", &url)
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let held: Held = holding.finish()?;
    let detail = format!(
        "open since before: {} answers, the last {:.0} ms after enrolment, interrupted: {}{}, longest wait {:.0} ms",
        held.answered,
        held.last_answer_ms - enrolled,
        held.interrupted,
        held.error.as_deref().map(|error| format!(" ({error})")).unwrap_or_default(),
        held.longest_wait_ms
    );
    let goes_on = !held.interrupted && held.last_answer_ms > enrolled;
    stage.check_measured("a connection that was open before goes on", goes_on, detail);
    let servers = format!("60 new connections: {:?}; {}", call.servers, call.brief());
    let across = call.servers.keys().any(|name| name.ends_with("-b"));
    stage.check_measured("new connections work, across nodes too", call.ok == 60 && across, servers);
    link(stage, &segments)?;
    true_client(stage)?;
    identity(stage)?;
    strict(stage)
}

/// Shows that the capture sees plaintext where there is some; otherwise not finding it later would say nothing.
fn camera(stage: &mut Stage<'_>) -> Result<()> {
    let (call, segments) = stage.captured(|stage| {
        stage.call("checkout-1", &format!("http://{PAYMENTS}/{MARKER} --count 30 --new-connection"))
    })?;
    let seen = contains(&segments, MARKER);
    let detail = format!("before enrolment: {}; {} segments, marker seen: {seen}", call.brief(), segments.len());
    stage.check_measured("before enrolment the capture shows the plaintext", seen && call.ok == 30, detail);
    Ok(())
}

/// What was on the wire between the nodes.
fn link(stage: &mut Stage<'_>, segments: &[Segment]) -> Result<()> {
    stage.type_this("tcpdump on the link between the nodes");
    let mut pods = BTreeSet::new();
    for pod in ["frontend-1", "checkout-1", "payments-v1-a", "payments-v1-b", "payments-v2-b"] {
        pods.extend([stage.ip(pod, false)?, stage.ip(pod, true)?]);
    }
    let between = |s: &&Segment| pods.contains(&s.src.0) && pods.contains(&s.dst.0);
    let in_tunnel = |s: &Segment| s.src.1 == HBONE || s.dst.1 == HBONE;
    // Connections from before the enrolment go on in plaintext to their end: the one that is held, and on a slow machine the
    // last of the earlier calls. None of them is opened here.
    let ends = |s: &Segment| (s.src.min(s.dst), s.src.max(s.dst));
    let opened: BTreeSet<(End, End)> = segments.iter().filter(|s| s.syn).map(ends).collect();
    let (meshed, old): (Vec<&Segment>, Vec<&Segment>) =
        segments.iter().filter(between).partition(|s| in_tunnel(s) || opened.contains(&ends(s)));
    let elsewhere = meshed.iter().filter(|s| !in_tunnel(s)).count();
    let detail = format!(
        "{} TCP segments captured, {} between meshed pods, {elsewhere} of them not on port {HBONE}; {} of connections from before",
        segments.len(),
        meshed.len(),
        old.len()
    );
    stage.check_measured("between the nodes only port 15008 is used", !meshed.is_empty() && elsewhere == 0, detail);

    let mut directions: BTreeMap<(End, End), Vec<&Segment>> = BTreeMap::new();
    for segment in meshed.iter().filter(|segment| !segment.payload.is_empty()) {
        directions.entry((segment.src, segment.dst)).or_default().push(segment);
    }
    let (mut hellos, mut answers, mut old, mut strange, mut records) = (0, 0, 0, 0, 0);
    for segments in directions.values() {
        match segments.first().map(|first| opening(&first.payload)) {
            Some(Opening::ClientHello) => hellos += 1,
            Some(Opening::ServerHello(Some(0x0304))) => answers += 1,
            Some(Opening::ServerHello(_)) => old += 1,
            // A connection of the pool may have been opened before the capture began: then it starts with a record.
            _ => strange += usize::from(segments.first().is_none_or(|first| record_type(&first.payload).is_none())),
        }
        records += segments.iter().filter(|segment| record_type(&segment.payload) == Some(23)).count();
    }
    let detail = format!(
        "{} directions: {hellos} ClientHellos, {answers} ServerHellos choosing TLS 1.3 (0x0304), {old} choosing another, {strange} that are no TLS; {records} segments start with encrypted records",
        directions.len()
    );
    let ok = answers > 0 && old == 0 && strange == 0 && records > 0;
    stage.check_measured("and on it only TLS 1.3", ok, detail);
    let seen = contains(segments, MARKER);
    stage.check(
        "the request's path and header are nowhere in the captured bytes",
        !seen,
        format!("marker {MARKER:?} seen: {seen}"),
    );
    Ok(())
}

fn true_client(stage: &mut Stage<'_>) -> Result<()> {
    let client = stage.ip("checkout-1", false)?;
    let mut peers = BTreeSet::new();
    for pod in ["payments-v1-a", "payments-v1-b"] {
        let server = stage.ip(pod, false)?;
        let seen = stage.connect("checkout-1", &format!("{server}:9090 --say WHO"))?;
        peers.insert(seen.replied("peer").rsplit_once(':').map(|(ip, _)| ip.to_owned()).unwrap_or_default());
    }
    let ok = peers == BTreeSet::from([client.to_string()]);
    stage.check_measured(
        "payments' accept() shows the true client address",
        ok,
        format!("accept() saw {peers:?}, checkout has {client}"),
    );
    Ok(())
}

fn identity(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("strata observe --layer mesh --pod shop/checkout-1");
    let wanted = "spiffe://cluster.local/ns/shop/sa/checkout";
    let mut found = String::new();
    let waited = stage.wait("the connection event", |stage| {
        let events = stage.ground.events("proxy-node-b")?;
        let event = events.iter().rev().find(|event| {
            event["direction"] == "inbound"
                && event["source"]["identity"] == wanted
                && event["security"] == "mutual_tls"
        });
        found = event
            .map(|event| format!("node-b's proxy: inbound from {wanted} over {}", event["security"]))
            .unwrap_or_default();
        Ok(!found.is_empty())
    });
    stage.check_measured("the peer's SPIFFE identity is reported", waited.is_ok(), found);
    Ok(())
}

fn strict(stage: &mut Stage<'_>) -> Result<()> {
    let ask = |stage: &Stage<'_>, pod: &str| {
        stage.call(pod, &format!("http://{PAYMENTS}/ --count 10 --new-connection --timeout 2s"))
    };
    let permissive = ask(stage, "outside/gateway-1")?;
    let detail = format!("PERMISSIVE, from outside the mesh: {}", permissive.brief());
    stage.check_measured("without STRICT a client outside the mesh is served", permissive.ok == 10, detail);
    stage.place("strict")?;
    let refused =
        stage.wait("STRICT to refuse the client outside", |stage| Ok(ask(stage, "outside/gateway-1")?.ok == 0));
    let outside = ask(stage, "outside/gateway-1")?;
    let detail = format!("STRICT, from outside the mesh: {}", outside.brief());
    stage.check_measured("STRICT refuses it", refused.is_ok() && outside.ok == 0, detail);
    let inside = ask(stage, "checkout-1")?;
    stage.check_measured("and serves checkout", inside.ok == 10, format!("STRICT, from checkout: {}", inside.brief()));
    Ok(())
}
