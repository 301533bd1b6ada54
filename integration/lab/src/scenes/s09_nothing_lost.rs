//! Scene 9: processes die under traffic.
use std::time::Duration;

use super::Scene;
use super::stage::{BANK, PAYMENTS, Stage};
use crate::Result;
use crate::client::{Call, Running};

pub(super) const SCENE: Scene = Scene {
    number: 9,
    title: "Nothing lost",
    expect: "kill -9 of the agent, then of strata-control, while traffic runs: no request fails, policy is still enforced, \
             both come back and reconcile; a node proxy's upgrade drains; with the proxy dead meshed traffic fails closed",
    play,
};

/// For a process that came back.
const BACK: Duration = Duration::from_secs(20);

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.meshed()?;
    stage.place("policy")?;
    stage.place("l4-authorization")?;
    stage.wait("the policies to be in force", |stage| {
        Ok(!reaches(stage, "frontend-1")? && reaches(stage, "checkout-1")?)
    })?;
    killed(stage, "agent-node-a")?;
    killed(stage, "control")?;
    upgraded(stage)?;
    closed(stage)
}

/// Requests over kept connections and over new ones.
fn traffic(stage: &Stage<'_>, seconds: u32) -> Result<[Running; 2]> {
    let kept = format!("http://{PAYMENTS}/ --count 0 --rate 100 --duration {seconds}s --concurrency 2 --timeout 3s");
    let fresh = format!(
        "http://{PAYMENTS}/ --count 0 --rate 50 --duration {seconds}s --concurrency 2 --timeout 3s --new-connection"
    );
    Ok([stage.spawn("checkout-1", "call", &kept)?, stage.spawn("checkout-1", "call", &fresh)?])
}

fn reports(stage: &mut Stage<'_>, what: &str, running: [Running; 2]) -> Result<()> {
    for (name, running) in ["kept connections", "new connections"].into_iter().zip(running) {
        let call: Call = running.report()?;
        let ok = call.failed() == 0 && call.sent > 100;
        stage.check_measured(
            &format!("{what}: no request over {name} fails"),
            ok,
            format!("{what}, {name}: {}", call.brief()),
        );
    }
    Ok(())
}

fn reaches(stage: &Stage<'_>, pod: &str) -> Result<bool> {
    Ok(stage.call(pod, &format!("http://{PAYMENTS}/ --timeout 2s"))?.ok == 1)
}

fn killed(stage: &mut Stage<'_>, process: &str) -> Result<()> {
    stage.type_this(format!("kill -9 the {process}"));
    let running = traffic(stage, 6)?;
    std::thread::sleep(Duration::from_secs(1));
    let old = stage.lab()?.pid(process);
    stage.lab()?.kill9(process)?;
    std::thread::sleep(Duration::from_millis(300));
    // While it is dead.
    let frontend = stage.connect("frontend-1", &format!("{PAYMENTS}:80"))?;
    let payments = stage.connect("payments-v1-a", "10.96.1.11:80")?;
    let errors =
        format!("frontend to payments: {}, payments to checkout: {}", shown(&frontend.error), shown(&payments.error));
    let ok = frontend.error.as_deref() == Some("EPERM") && payments.error.as_deref() == Some("EPERM");
    stage.check_measured(&format!("{process} dead: policy is still enforced"), ok, errors);
    std::thread::sleep(Duration::from_millis(700));
    stage.lab()?.release(process)?;
    let took = stage.lab()?.wait_ready(process, BACK)?;
    let new = stage.lab()?.pid(process);
    stage.check_measured(
        &format!("{process} comes back"),
        new.is_some() && new != old,
        format!("{process} ready again after {} ms", took.as_millis()),
    );
    reports(stage, &format!("{process} killed"), running)?;
    reconciles(stage, process)
}

fn shown(error: &Option<String>) -> &str {
    error.as_deref().unwrap_or("connected")
}

/// What changes after the return counts again.
fn reconciles(stage: &mut Stage<'_>, process: &str) -> Result<()> {
    let waited = if process == "control" {
        // Configuration of the upper layer comes from it.
        stage.place("strict")?;
        let outside = |stage: &Stage<'_>| stage.call("outside/gateway-1", &format!("http://{PAYMENTS}/ --timeout 1s"));
        let closed = stage.wait("STRICT to be in force", |stage| Ok(outside(stage)?.ok == 0));
        stage.remove("strict")?;
        closed
    } else {
        stage.write("policy", Stage::text_of("policy-open"))?;
        let opened =
            stage.wait("the edited policy", |stage| Ok(stage.connect("frontend-1", &format!("{PAYMENTS}:9090"))?.ok));
        stage.write("policy", Stage::text_of("policy"))?;
        let closed = stage
            .wait("the policy as before", |stage| Ok(!stage.connect("frontend-1", &format!("{PAYMENTS}:9090"))?.ok));
        opened.and(closed)
    };
    let detail =
        waited.as_ref().err().map_or_else(|| "a change made afterwards is in force".to_owned(), ToString::to_string);
    stage.check_measured(&format!("{process} reconciles"), waited.is_ok(), format!("{process}: {detail}"));
    Ok(())
}

fn upgraded(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("start a new strata-proxy for node-a, then SIGTERM the old one");
    let running = traffic(stage, 8)?;
    std::thread::sleep(Duration::from_secs(1));
    let upgraded = stage.lab()?.upgrade("proxy-node-a", BACK);
    let detail =
        upgraded.as_ref().err().map_or_else(|| "old one drained, new one serves".to_owned(), ToString::to_string);
    stage.check_measured("the node proxy is replaced", upgraded.is_ok(), format!("proxy-node-a: {detail}"));
    let [kept, fresh] = running;
    let kept: Call = kept.report()?;
    let fresh: Call = fresh.report()?;
    stage.check_measured(
        "upgrade: no new connection fails",
        fresh.failed() == 0 && fresh.sent > 100,
        format!("upgrade, new connections: {}", fresh.brief()),
    );
    // A drained connection ends when the deadline has passed; a request in that moment may see it.
    stage.check_measured(
        "upgrade: requests over kept connections go on",
        kept.failed() <= 2 && kept.sent > 100,
        format!("upgrade, kept connections: {}", kept.brief()),
    );
    Ok(())
}

fn closed(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("kill -9 node-a's strata-proxy, and look at the link");
    // The grant would keep pairs of this node talking, rightly: the kernel attests and judges them. Across nodes
    // there is only the proxy.
    let remote = stage.ip("payments-v1-b", false)?;
    stage.lab()?.kill9("proxy-node-a")?;
    let outcome = stage.captured(|stage| {
        let call =
            stage.call("checkout-1", &format!("http://{remote}:8080/ --count 5 --new-connection --timeout 500ms"))?;
        let bank = stage.connect("checkout-1", &format!("{BANK}:8080 --timeout 1s"))?;
        Ok((call, bank))
    });
    stage.lab()?.release("proxy-node-a")?;
    let ((call, bank), segments) = outcome?;
    let plain = segments.iter().filter(|s| s.dst.0 == remote && s.dst.1 != 15008).count();
    let ok = call.ok == 0 && !bank.ok && plain == 0;
    let detail = format!(
        "proxy dead: {}; to the bank: {}; {plain} plaintext segments on the link",
        call.brief(),
        shown(&bank.error)
    );
    stage.check_measured("with the proxy dead meshed traffic fails closed", ok, detail);
    stage.lab()?.wait_ready("proxy-node-a", BACK)?;
    let back = stage.time_until("traffic to flow again", |stage| {
        Ok(stage.call("checkout-1", &format!("http://{remote}:8080/ --timeout 1s"))?.ok == 1)
    });
    let detail = back.as_ref().map_or_else(ToString::to_string, |took| {
        format!("traffic flows {} ms after the proxy was ready", took.as_millis())
    });
    stage.check_measured("and comes back with it", back.is_ok(), detail);
    Ok(())
}
