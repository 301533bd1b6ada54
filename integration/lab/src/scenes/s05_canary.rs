//! Scene 5: a canary moves while requests run.
use std::time::{Duration, SystemTime};

use super::Scene;
use super::stage::{PAYMENTS, Stage, millis};
use crate::Result;
use crate::client::Call;

pub(super) const SCENE: Scene = Scene {
    number: 5,
    title: "Canary: 90/10, 50/50, 0/100 under load",
    expect: "splits within four standard deviations over 2,000 requests each, weight 0 gets exactly none, effect in \
             under a second after the file is saved, no request fails",
    play,
};

/// Requests a second, and how long each split is left in place: over 2,000 requests besides the first second.
const RATE: u32 = 200;
const PHASE: Duration = Duration::from_millis(11_500);
/// From saving to effect.
const PROMISE: Duration = Duration::from_secs(1);

const SPLITS: [(&str, f64); 3] = [("canary-90-10", 0.1), ("canary-50-50", 0.5), ("canary-0-100", 1.0)];

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.governed()?;
    stage.place("v1-only")?;
    stage.wait("everyone to get v1", |stage| {
        Ok(stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count 20"))?.version("v1") == 20)
    })?;
    stage.remove("v1-only")?;
    let first = stage.place("canary-90-10")?;
    stage.wait("the canary to get its first request", |stage| {
        Ok(stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count 40"))?.version("v2") > 0)
    })?;
    let seconds = PHASE.as_secs_f64() * 3.0;
    stage.type_this(format!(
        "in checkout-1: strata-echo call http://{PAYMENTS}/ --count 0 --rate {RATE} --duration {seconds:.0}s"
    ));
    let arguments = format!(
        "http://{PAYMENTS}/ --count 0 --rate {RATE} --duration {:.1}s --concurrency 4 --samples",
        seconds + 0.5
    );
    let running = stage.spawn("checkout-1", "call", &arguments)?;
    std::thread::sleep(PHASE);
    let mut saved = vec![first];
    for (piece, _) in &SPLITS[1..] {
        stage.type_this(format!("edit the weights there, as in {piece}.yaml"));
        // One file is edited, as a user would: no moment without a route.
        saved.push(stage.write("canary-90-10", Stage::text_of(piece))?);
        std::thread::sleep(PHASE);
    }
    let call: Call = running.report()?;
    stage.check_measured(
        "no request fails",
        call.failed() == 0 && call.sent > 0,
        format!("{RATE} requests a second: {}", call.brief()),
    );
    for (index, (piece, share)) in SPLITS.into_iter().enumerate() {
        let from = millis(saved[index] + PROMISE);
        let until = saved.get(index + 1).map_or(f64::INFINITY, |next| millis(*next));
        split(stage, &call, piece, share, from..until);
    }
    effect(stage, &call, saved[2]);
    stage.remove("canary-90-10")?;
    gateway_api(stage)
}

/// The same by Gateway API: an HTTPRoute to two Services by weight.
fn gateway_api(stage: &mut Stage<'_>) -> Result<()> {
    stage.place("http-route")?;
    let ask = |stage: &Stage<'_>, count: u64| {
        stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count {count} --concurrency 4"))
    };
    // Without any route v2 gets a third, near enough to be taken for the route's quarter: look where it was sent.
    stage.wait("the HTTPRoute", |stage| {
        ask(stage, 4)?;
        let events = stage.ground.events("shop/waypoint-1")?;
        let cluster = events.last().and_then(|event| event["cluster"].as_str().map(str::to_owned));
        Ok(cluster.is_some_and(|cluster| cluster.contains("payments-v1.") || cluster.contains("payments-v2.")))
    })?;
    let call = ask(stage, 2000)?;
    stage.check("HTTPRoute: no request fails", call.ok == 2000, call.brief());
    stage.check_share("HTTPRoute 75/25: v2's share", call.version("v2"), call.sent, 0.25);
    Ok(())
}

fn split(stage: &mut Stage<'_>, call: &Call, piece: &str, share: f64, window: std::ops::Range<f64>) {
    // A request counts for the split in which it both began and was answered.
    let inside = call.samples.iter().filter(|sample| window.contains(&sample.0) && sample.0 + sample.3 < window.end);
    let (mut total, mut second) = (0, 0);
    for sample in inside {
        total += 1;
        second += u64::from(sample.2 == "v2");
    }
    stage.check(&format!("{piece}: 2,000 requests were measured"), total >= 2000, format!("{total} requests"));
    stage.check_share(&format!("{piece}: v2's share"), second, total, share);
    if share >= 1.0 {
        stage.check("weight 0 gets exactly none", total - second == 0, format!("{} requests to v1", total - second));
    }
}

/// The last switch is sharp: after it v1 gets nothing.
fn effect(stage: &mut Stage<'_>, call: &Call, saved: SystemTime) {
    let old = call.samples.iter().filter(|sample| sample.2 == "v1").map(|sample| sample.0 + sample.3).reduce(f64::max);
    let after = old.map_or(f64::INFINITY, |last| last - millis(saved));
    let ok = after < PROMISE.as_secs_f64() * 1e3;
    let detail = format!("last answer of v1 {after:.0} ms after the file that takes it out was saved");
    stage.check_measured("effect in under a second", ok, detail);
}
