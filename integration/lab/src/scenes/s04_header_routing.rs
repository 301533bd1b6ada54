//! Scene 4: a header decides.
use super::Scene;
use super::stage::{PAYMENTS, Stage};
use crate::Result;

pub(super) const SCENE: Scene = Scene {
    number: 4,
    title: "Header routing",
    expect: "requests with x-user: jason are answered by v2, all others by v1, without exception",
    play,
};

const REQUESTS: u64 = 200;

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.governed()?;
    stage.place("header")?;
    let ask = |stage: &Stage<'_>, count: u64, header: &str| {
        stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count {count} --host payments.shop {header}"))
    };
    stage.wait("the route", |stage| {
        Ok(ask(stage, 10, "-H x-user:jason")?.version("v2") == 10 && ask(stage, 10, "")?.version("v1") == 10)
    })?;
    stage
        .type_this(format!("in checkout-1: strata-echo call http://{PAYMENTS}/ -H 'x-user: jason' --count {REQUESTS}"));
    for (who, header, version) in
        [("jason", "-H x-user:jason", "v2"), ("jack", "-H x-user:jack", "v1"), ("nobody", "", "v1")]
    {
        let call = ask(stage, REQUESTS, header)?;
        let ok = call.ok == REQUESTS && call.version(version) == REQUESTS;
        let detail = format!("{who}: {:?}; {}", call.versions, call.brief());
        stage.check_measured(&format!("{who} gets {version}"), ok, detail);
    }
    Ok(())
}
