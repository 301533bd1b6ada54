//! Scene 7: who asks, as which workload, with which token, for what.
use super::Scene;
use super::stage::{PAYMENTS, Stage};
use crate::Result;

pub(super) const SCENE: Scene = Scene {
    number: 7,
    title: "Zero trust with JWT",
    expect: "no token 403, bad or expired token 401, good token 200, wrong claim 403; authorization by principal, path and \
             method; a claim routes to v2",
    play,
};

/// One question and the answer it must get.
struct Case<'a> {
    what: &'a str,
    pod: &'a str,
    path: &'a str,
    flags: String,
    status: u16,
}

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.governed()?;
    by_principal(stage)?;
    by_token(stage)
}

fn judge(stage: &mut Stage<'_>, case: &Case<'_>) -> Result<()> {
    let arguments = format!("http://{PAYMENTS}{} --count 5 {}", case.path, case.flags);
    let call = stage.call(case.pod, &arguments)?;
    let ok = call.with_status(case.status) == 5;
    let detail = format!(
        "{}: {:?}{}",
        case.what,
        call.status,
        if call.errors.is_empty() { String::new() } else { format!(", errors {:?}", call.errors) }
    );
    stage.check_measured(&format!("{}: {}", case.what, case.status), ok, detail);
    Ok(())
}

fn by_principal(stage: &mut Stage<'_>) -> Result<()> {
    stage.place("authorization")?;
    stage.wait("the policy by principal", |stage| {
        let frontend = stage.call("frontend-1", &format!("http://{PAYMENTS}/pay"))?;
        let checkout = stage.call("checkout-1", &format!("http://{PAYMENTS}/pay"))?;
        Ok(frontend.with_status(403) == 1 && checkout.ok == 1)
    })?;
    let case = |what, pod, path, flags: &str, status| Case { what, pod, path, flags: flags.to_owned(), status };
    for case in [
        case("checkout, GET /pay", "checkout-1", "/pay", "", 200),
        case("frontend, GET /pay (wrong principal)", "frontend-1", "/pay", "", 403),
        case("checkout, GET /other (wrong path)", "checkout-1", "/other", "", 403),
        case("checkout, POST /pay (wrong method)", "checkout-1", "/pay", "--method POST", 403),
    ] {
        judge(stage, &case)?;
    }
    stage.remove("authorization")?;
    Ok(())
}

fn by_token(stage: &mut Stage<'_>) -> Result<()> {
    let token = |stage: &Stage<'_>, flags: &[&str]| stage.ground.token(&[&["--audience", "payments"], flags].concat());
    let good = token(stage, &[])?;
    let admin = token(stage, &["--claim", "group=admins"])?;
    let tester = token(stage, &["--claim", "group=testers"])?;
    let expired = token(stage, &["--expires-in", "-600"])?;
    let stranger = token(stage, &["--issuer", "https://somebody.else"])?;
    let other_audience = stage.ground.token(&["--audience", "reviews"])?;
    // The signature is the last part; one changed letter in its middle breaks it.
    let mut forged = good.clone().into_bytes();
    let at = good.len() - 40;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    let forged = String::from_utf8_lossy(&forged).into_owned();
    let bearer = |token: &str| format!("-H authorization:Bearer~{token}");

    stage.place("jwt")?;
    stage.type_this("TOKEN=$(strata-echo token --keys KEYS --audience payments)");
    stage.type_this(format!(
        "in checkout-1: strata-echo call http://{PAYMENTS}/pay -H \"authorization: Bearer $TOKEN\""
    ));
    stage.wait("the issuer's keys and the policy", |stage| {
        let without = stage.call("checkout-1", &format!("http://{PAYMENTS}/pay"))?;
        let with = stage.call("checkout-1", &format!("http://{PAYMENTS}/pay {}", bearer(&good)))?;
        Ok(without.with_status(403) == 1 && with.ok == 1)
    })?;
    let case = |what, pod, path, flags: String, status| Case { what, pod, path, flags, status };
    for case in [
        case("no token", "checkout-1", "/pay", String::new(), 403),
        case("no token, public path", "checkout-1", "/public", String::new(), 200),
        case("good token", "checkout-1", "/pay", bearer(&good), 200),
        case("good token, wrong workload", "frontend-1", "/pay", bearer(&good), 403),
        case("good token, wrong method", "checkout-1", "/pay", format!("{} --method DELETE", bearer(&good)), 403),
        case("forged token", "checkout-1", "/pay", bearer(&forged), 401),
        case("no token at all in the header", "checkout-1", "/pay", bearer("nonsense"), 401),
        case("expired token", "checkout-1", "/pay", bearer(&expired), 401),
        case("another issuer's token", "checkout-1", "/pay", bearer(&stranger), 401),
        case("a token for another audience", "checkout-1", "/pay", bearer(&other_audience), 403),
        case("wrong claim for /admin", "checkout-1", "/admin", bearer(&good), 403),
        case("right claim for /admin", "frontend-1", "/admin", bearer(&admin), 200),
    ] {
        judge(stage, &case)?;
    }
    claim_route(stage, &bearer(&tester), &bearer(&good))
}

fn claim_route(stage: &mut Stage<'_>, tester: &str, user: &str) -> Result<()> {
    if let Err(error) = stage.place("claim-route") {
        // Istio's webhook takes routes by claim for gateways only; the waypoint and the embedded control plane serve them.
        let refused = error.to_string().contains("validation.istio.io");
        stage.check_measured(
            "routes by claim are Istio's to admit",
            refused,
            "istiod's webhook refuses a route by claim",
        );
        return Ok(());
    }
    let ask = |stage: &Stage<'_>, count: u64, flags: &str| {
        stage.call("checkout-1", &format!("http://{PAYMENTS}/pay --count {count} {flags}"))
    };
    stage.wait("the route by claim", |stage| {
        Ok(ask(stage, 10, tester)?.version("v2") == 10 && ask(stage, 10, user)?.version("v1") == 10)
    })?;
    for (who, flags, version) in [("a tester's token", tester, "v2"), ("any other good token", user, "v1")] {
        let call = ask(stage, 100, flags)?;
        let detail = format!("{who}: {:?}; {}", call.versions, call.brief());
        stage.check_measured(
            &format!("{who} routes to {version}"),
            call.version(version) == 100 && call.ok == 100,
            detail,
        );
    }
    Ok(())
}
