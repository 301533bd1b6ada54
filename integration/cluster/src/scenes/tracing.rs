//! Spans of governed requests.
use serde_json::Value;
use strata_lab::Result;

use super::Own;
use super::act::Act;

pub(super) const SCENE: Own = Own {
    number: 20,
    title: "Traces",
    expect: "with a Telemetry resource every request through the waypoint leaves one span at the collector, in the caller's \
             trace where it has one, with Istio's tags; a caller that does not sample leaves none; with a Zipkin provider \
             the same in Zipkin's JSON, and the trace is handed on in B3 headers",
    play,
};

const CALLER: &str = "shop/checkout-1";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn play(act: &mut Act<'_>) -> Result<()> {
    act.governed()?;
    act.place("cluster/tracing")?;
    act.kubectl().run(&["rollout", "status", "-n", "shop", "deployment", "otel", "--timeout=60s"])?;
    let arrived = act.wait("a span at the collector", |act| {
        act.call(CALLER, "http://payments.shop/first --timeout 2s")?;
        Ok(!spans(act, "/first")?.is_empty())
    });
    act.check("requests leave spans", arrived.is_ok(), "after the Telemetry resource");

    let call = act.call(CALLER, "http://payments.shop/counted --count 40 --timeout 2s")?;
    let counted = act.wait("40 spans", |act| Ok(spans(act, "/counted")?.len() >= 40));
    let all = spans(act, "/counted")?;
    let mut ids: Vec<_> = all.iter().map(|span| text(span, "trace_id")).collect();
    ids.sort_unstable();
    ids.dedup();
    let detail = format!("{}; {} spans in {} traces", call.brief(), all.len(), ids.len());
    act.check_measured("one span a request, each in a trace of its own", counted.is_ok() && ids.len() == 40, detail);

    for (flags, path, expected) in [("01", "/joined", 1), ("00", "/unwanted", 0)] {
        let header = format!("-H traceparent:00-{TRACE}-{SPAN}-{flags}");
        act.call(CALLER, &format!("http://payments.shop{path} --timeout 2s {header}"))?;
        // What comes later has passed the queue after it.
        act.call(CALLER, &format!("http://payments.shop{path}-after --timeout 2s"))?;
        act.wait("the span after it", |act| Ok(!spans(act, &format!("{path}-after"))?.is_empty()))?;
        let found = spans(act, path)?;
        let joined = found.iter().all(|span| text(span, "trace_id") == TRACE && text(span, "parent_span_id") == SPAN);
        let check = format!("a caller's trace with flags {flags}: {expected} span of it");
        act.check(&check, found.len() == expected && joined, format!("{} spans", found.len()));
    }

    let span = all.into_iter().next().unwrap_or_default();
    let tag = |name: &str| span["attributes"][name].as_str().unwrap_or_default().to_owned();
    let tags =
        ["istio.source_workload", "istio.destination_workload", "istio.namespace", "team", "http.status_code"].map(tag);
    let expected =
        tags[0].starts_with("checkout") && tags[1].starts_with("payments") && tags[2..] == ["shop", "payments", "200"];
    act.check_measured(
        "it says who called whom, with Istio's tags",
        expected,
        format!("{} {tags:?}", text(&span, "name")),
    );
    zipkin(act)
}

fn zipkin(act: &mut Act<'_>) -> Result<()> {
    let provider = r#"{"spec": {"tracing": [{"providers": [{"name": "zipkin"}], "randomSamplingPercentage": 100}]}}"#;
    act.type_this("kubectl patch telemetry tracing ... providers: [{name: zipkin}]");
    act.kubectl().run(&["patch", "telemetry", "-n", "shop", "tracing", "--type=merge", "-p", provider])?;
    let mut path = String::new();
    let arrived = act.wait("a span in the caller's B3 trace", |act| {
        path = format!("/b3-{}", std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis());
        act.call(CALLER, &format!("http://payments.shop{path} --timeout 2s -H b3:{TRACE}-{SPAN}-1"))?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        Ok(spans(act, &path)?.iter().any(|span| text(span, "trace_id") == TRACE))
    });
    let found = spans(act, &path)?;
    let joined = found.iter().all(|span| text(span, "trace_id") == TRACE && text(span, "parent_span_id") == SPAN);
    act.check(
        "a Zipkin provider: one span in a caller's B3 trace",
        arrived.is_ok() && found.len() == 1 && joined,
        format!("{} spans", found.len()),
    );
    Ok(())
}

fn text<'s>(span: &'s Value, field: &str) -> &'s str {
    span[field].as_str().unwrap_or_default()
}

/// What the collector printed of requests for `path`.
fn spans(act: &Act<'_>, path: &str) -> Result<Vec<Value>> {
    let printed = act.kubectl().run(&["logs", "-n", "shop", "deployment/otel", "--tail=-1"])?;
    let all = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(all.filter(|span| span["attributes"]["http.url"].as_str().is_some_and(|url| url.ends_with(path))).collect())
}
