//! Scene 6: failing backends, injected faults, mirrored requests.
use super::Scene;
use super::stage::{PAYMENTS, Stage};
use crate::Result;
use crate::client::Call;

pub(super) const SCENE: Scene = Scene {
    number: 6,
    title: "Resilience",
    expect: "retries turn a backend that fails half its requests into a success rate above 99 %; a per-try timeout ends \
             slow tries; outlier detection ejects a broken endpoint; injected faults hit their percentage; mirroring \
             copies every request",
    play,
};

const REQUESTS: u64 = 500;

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.governed()?;
    retries(stage)?;
    timeout(stage)?;
    faults(stage)?;
    mirror(stage)?;
    outlier(stage)
}

fn ask(stage: &Stage<'_>, path: &str, count: u64, flags: &str) -> Result<Call> {
    stage.call("checkout-1", &format!("http://{PAYMENTS}{path} --count {count} --concurrency 4 {flags}"))
}

/// Puts a route in place and waits until `in_force` says it is.
fn routed(stage: &mut Stage<'_>, piece: &str, mut in_force: impl FnMut(&Stage<'_>) -> Result<bool>) -> Result<()> {
    stage.place(piece)?;
    stage.wait(&format!("{piece}.yaml to be in force"), |stage| in_force(stage))
}

fn retries(stage: &mut Stage<'_>) -> Result<()> {
    // Every try of a request fails with the chance the query names.
    let path = "/?fail_percent=50";
    routed(stage, "no-retries", |stage| Ok(ask(stage, path, 40, "")?.failed() > 5))?;
    stage.type_this(format!("in checkout-1: strata-echo call http://{PAYMENTS}{path} --count {REQUESTS}"));
    let without = ask(stage, path, REQUESTS, "")?;
    stage.check_share("without retries: failed requests", without.failed(), without.sent, 0.5);
    stage.remove("no-retries")?;
    routed(stage, "retries", |stage| Ok(ask(stage, path, 40, "")?.failed() == 0))?;
    let with = ask(stage, path, REQUESTS, "")?;
    let rate = with.ok as f64 * 100.0 / with.sent.max(1) as f64;
    stage.check_measured(
        "with retries more than 99 % succeed",
        rate > 99.0,
        format!("with retries {rate:.1} % succeed: {}", with.brief()),
    );
    stage.remove("retries")?;
    Ok(())
}

fn timeout(stage: &mut Stage<'_>) -> Result<()> {
    let path = "/?delay=2s";
    routed(stage, "timeout", |stage| Ok(ask(stage, path, 1, "")?.with_status(504) == 1))?;
    let call = ask(stage, path, 12, "")?;
    // Three tries of 200 ms and the pauses between them, far from the 2 s of the backend and the 5 s of the whole.
    let ok = call.with_status(504) == 12 && call.latency_ms.p50 >= 600.0 && call.latency_ms.p50 < 1500.0;
    let detail =
        format!("backend takes 2 s, tries may take 200 ms: {:?}, median {:.0} ms", call.status, call.latency_ms.p50);
    stage.check_measured("a per-try timeout ends slow tries", ok, detail);
    let fast = ask(stage, "/", 50, "")?;
    stage.check("and leaves fast ones alone", fast.ok == 50, fast.brief());
    stage.remove("timeout")?;
    Ok(())
}

fn faults(stage: &mut Stage<'_>) -> Result<()> {
    routed(stage, "fault-delay", |stage| Ok(ask(stage, "/", 20, "")?.latency_ms.max >= 200.0))?;
    let call = ask(stage, "/", REQUESTS, "--samples")?;
    let delayed = call.samples.iter().filter(|sample| sample.3 >= 200.0).count() as u64;
    stage.check_share("delayed by 200 ms", delayed, call.sent, 0.3);
    stage.check("delayed requests succeed all the same", call.ok == call.sent, call.brief());
    stage.remove("fault-delay")?;
    routed(stage, "fault-abort", |stage| Ok(ask(stage, "/", 40, "")?.with_status(418) > 0))?;
    let call = ask(stage, "/", REQUESTS, "")?;
    stage.check_share("aborted with 418", call.with_status(418), call.sent, 0.2);
    stage.remove("fault-abort")?;
    Ok(())
}

fn mirror(stage: &mut Stage<'_>) -> Result<()> {
    let shadow = stage.ip("payments-v2-b", false)?;
    // The server numbers the requests that reach it.
    let number = |stage: &Stage<'_>| -> Result<u64> {
        let call = stage.call("checkout-1", &format!("http://{shadow}:8080/"))?;
        Ok(call.body("request").parse().unwrap_or(0))
    };
    routed(stage, "mirror", |stage| {
        let before = number(stage)?;
        let call = ask(stage, "/", 10, "")?;
        Ok(call.version("v1") == 10 && number(stage)? >= before + 11)
    })?;
    let before = number(stage)?;
    let call = ask(stage, "/", 100, "")?;
    let mut copies = 0;
    let mut looks = 0;
    // Copies are sent and forgotten: the last ones may still be on their way. Each look is a request itself.
    let arrived = stage.wait("the copies", |stage| {
        looks += 1;
        copies = number(stage)?.saturating_sub(before + looks);
        Ok(copies >= 100)
    });
    let ok = arrived.is_ok() && copies == 100 && call.ok == 100 && call.version("v1") == 100;
    let detail = format!("100 requests: {:?} answered, {copies} copies reached v2", call.versions);
    stage.check_measured("v1 answers, v2 gets a copy of each", ok, detail);
    stage.remove("mirror")?;
    Ok(())
}

fn outlier(stage: &mut Stage<'_>) -> Result<()> {
    let path = "/?fail_on=payments-v2-b";
    // Without detection a third of the requests fails, for as long as one asks.
    // The piece holds the subsets as well: of two rules of one name the later file's counts.
    stage.place("outlier")?;
    stage.remove("subsets")?;
    let mut failures = 0;
    stage.wait("the broken endpoint to be ejected", |stage| {
        let call = ask(stage, path, 30, "")?;
        failures += call.failed();
        Ok(call.failed() == 0 && failures > 0)
    })?;
    let call = ask(stage, path, 200, "")?;
    let detail = format!("until it was ejected {failures} requests failed; then {:?}, {}", call.servers, call.brief());
    let gone = !call.servers.contains_key("payments-v2-b");
    stage.check_measured("a broken endpoint is ejected", call.ok == 200 && gone && failures > 0, detail);
    Ok(())
}
