//! Scene 2: NetworkPolicy by identity, changed under running traffic.
use std::time::{Duration, SystemTime};

use super::Scene;
use super::stage::{BANK, PAYMENTS, Stage, millis};
use crate::client::{Call, Running};
use crate::{LabError, Result};

pub(super) const SCENE: Scene = Scene {
    number: 2,
    title: "L3/L4 policy by identity",
    expect: "checkout reaches payments, frontend is refused at once (EPERM) and the flow names policy and rule; payments \
             leaves to the bank's gateway only; a changed label or policy counts within 100 ms, for open connections too",
    play,
};

/// From the file being saved to the new verdict on packets.
const PROMISE_MS: f64 = 100.0;

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.unmeshed()?;
    let before = stage.connect("frontend-1", &format!("{PAYMENTS}:80"))?;
    stage.check("before the policy the frontend reaches payments", before.ok, format!("{:?}", before.error));
    closing(stage)?;
    verdicts(stage)?;
    egress(stage)?;
    opening(stage, "frontend-as-checkout", "a changed label")?;
    stage.remove("frontend-as-checkout")?;
    stage.wait("the frontend to be refused again", |stage| {
        Ok(!stage.connect("frontend-1", &format!("{PAYMENTS}:80"))?.ok)
    })?;
    edited(stage)
}

/// The policy appears under a running connection.
fn closing(stage: &mut Stage<'_>) -> Result<()> {
    // One connection, used 200 times a second: what the policy does to it is the first answer that does not come.
    let arguments = format!("http://{PAYMENTS}/ --count 0 --rate 200 --duration 3s --timeout 250ms --samples");
    let running = stage.spawn("frontend-1", "call", &arguments)?;
    std::thread::sleep(Duration::from_millis(1200));
    let saved = stage.place("policy")?;
    let call: Call = running.report()?;
    let last = call.samples.iter().filter(|sample| sample.1 == 200).map(|sample| sample.0 + sample.3).reduce(f64::max);
    let cut = last.map(|last| last - millis(saved)).ok_or_else(|| LabError::Other(call.brief()))?;
    let after = call.samples.iter().filter(|sample| sample.0 > millis(saved) + PROMISE_MS);
    let leaked = after.clone().filter(|sample| sample.1 != 0).count();
    let detail = format!(
        "open connection of the frontend: last answer {cut:.0} ms after the file was saved; {} requests later, {leaked} answered",
        after.count()
    );
    stage.check_measured(
        "the new policy cuts an open connection within 100 ms",
        cut < PROMISE_MS && leaked == 0,
        detail,
    );
    let first = format!("errors: {:?}", call.errors);
    stage.check_measured("new connections are refused with EPERM", call.errors.contains_key("connect: EPERM"), first);
    Ok(())
}

fn verdicts(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this(format!("in checkout-1 and frontend-1: strata-echo connect {PAYMENTS}:80"));
    let allowed = stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count 30 --new-connection"))?;
    stage.check_measured("checkout may reach payments", allowed.ok == 30, format!("checkout: {}", allowed.brief()));
    let pod = stage.ip("payments-v1-b", false)?;
    for target in [format!("{PAYMENTS}:80"), format!("{pod}:8080")] {
        let denied = stage.connect("frontend-1", &target)?;
        let error = denied.error.unwrap_or_else(|| "connected".to_owned());
        let detail = format!("frontend to {target}: {error} after {:.2} ms", denied.took_ms);
        stage.check_measured(
            "the frontend may not, and learns it at once",
            error == "EPERM" && denied.took_ms < 500.0,
            detail,
        );
    }
    stage.type_this("strata observe --layer network --refused --pod shop/frontend-1");
    let mut found = String::new();
    let waited = stage.wait("the flow event", |stage| {
        let flows = stage.ground.events("agent-node-a")?;
        let refused = flows.iter().rev().find(|flow| {
            flow["src"]["pod"] == "frontend-1"
                && flow["dst"]["namespace"] == "shop"
                && flow["policy"]["text"].is_string()
        });
        found = refused
            .map(|flow| format!("{} {}: {}", flow["verdict"], flow["drop_reason"], flow["policy"]["text"]))
            .unwrap_or_default();
        Ok(!found.is_empty())
    });
    let names = found.contains("payments") && found.contains("dropped");
    stage.check_measured("the flow event names policy and rule", waited.is_ok() && names, format!("flow: {found}"));
    Ok(())
}

fn egress(stage: &mut Stage<'_>) -> Result<()> {
    // The bank answers or refuses, either way the packet left and an answer came back.
    let bank = stage.connect("payments-v1-a", &format!("{BANK}:8080"))?;
    let reached = bank.ok || bank.error.as_deref() == Some("ECONNREFUSED");
    let detail = format!("payments to the bank's gateway {BANK}: {}", bank.error.as_deref().unwrap_or("connected"));
    stage.check_measured("payments leaves to the external gateway's CIDR", reached, detail);
    let inside = stage.ip("outside/gateway-1", false)?;
    for (name, target) in [("a pod outside", format!("{inside}:8080")), ("checkout", "10.96.1.11:80".to_owned())] {
        let seen = stage.connect("payments-v1-a", &target)?;
        let error = seen.error.unwrap_or_else(|| "connected".to_owned());
        stage.check_measured(
            "payments goes nowhere else",
            error == "EPERM",
            format!("payments to {name} {target}: {error}"),
        );
    }
    Ok(())
}

/// The frontend tries to connect 200 times a second; returns when it has been refused for a while.
fn knocking(stage: &Stage<'_>) -> Result<Running> {
    let running = stage.spawn(
        "frontend-1",
        "call",
        &format!("http://{PAYMENTS}/ --count 0 --rate 200 --concurrency 8 --duration 2s --timeout 250ms --new-connection --samples"),
    )?;
    std::thread::sleep(Duration::from_millis(700));
    Ok(running)
}

/// A change that lets the frontend in.
fn opening(stage: &mut Stage<'_>, piece: &str, what: &str) -> Result<()> {
    let running = knocking(stage)?;
    let saved = stage.place(piece)?;
    let call: Call = running.report()?;
    opened(stage, &call, saved, what);
    Ok(())
}

fn opened(stage: &mut Stage<'_>, call: &Call, saved: SystemTime, what: &str) {
    let first = call.samples.iter().filter(|sample| sample.1 == 200).map(|sample| sample.0).reduce(f64::min);
    let lead = stage.ground.lead().as_secs_f64() * 1e3;
    let early = call.samples.iter().filter(|sample| sample.1 == 200 && sample.0 < millis(saved) - lead).count();
    let (ok, detail) = match first {
        Some(first) => {
            let after = first - millis(saved);
            (
                after < PROMISE_MS && early == 0,
                format!("{what}: first connection {after:.0} ms after the file was saved"),
            )
        }
        None => (false, format!("{what}: still refused: {}", call.brief())),
    };
    stage.check_measured(&format!("{what} counts within 100 ms"), ok, detail);
}

/// The policy's file is edited: one more peer.
fn edited(stage: &mut Stage<'_>) -> Result<()> {
    let running = knocking(stage)?;
    stage.type_this("edit policy.yaml there: add the frontend to ingress.from");
    let saved = stage.write("policy", Stage::text_of("policy-open"))?;
    let call: Call = running.report()?;
    opened(stage, &call, saved, "a changed policy");
    Ok(())
}
