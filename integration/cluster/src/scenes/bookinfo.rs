//! Istio's own sample, its manifests unmodified; only what runs under the images' names is ours.
use std::collections::BTreeMap;

use strata_lab::{LabError, Result};

use super::Own;
use super::act::Act;

pub(super) const SCENE: Own = Own {
    number: 13,
    title: "Bookinfo, unmodified, with its published routing samples",
    expect: "productpage shows three versions of reviews in turn; with the samples applied everyone gets v1, jason v2, then \
             half and half, then v3 for all; a delay for jason breaks his page only; Gateway API routes do the same",
    play,
};

const PAGE: &str = "http://productpage:9080/productpage";

fn play(act: &mut Act<'_>) -> Result<()> {
    let kubectl = act.kubectl();
    kubectl.words("delete namespace bookinfo --ignore-not-found --timeout=90s")?;
    kubectl.words("create namespace bookinfo")?;
    kubectl.words("label namespace bookinfo istio.io/dataplane-mode=ambient")?;
    let played = scenes(act);
    kubectl.words("delete namespace bookinfo --wait=false")?;
    played
}

fn scenes(act: &mut Act<'_>) -> Result<()> {
    apply(act, "platform/kube/bookinfo.yaml")?;
    apply(act, "platform/kube/bookinfo-versions.yaml")?;
    let gateway = include_str!("../../../../manifests/samples/cluster/waypoint.yaml")
        .replace("namespace: shop", "namespace: bookinfo");
    act.kubectl().apply("bookinfo-waypoint", &gateway)?;
    act.kubectl().words("label namespace bookinfo istio.io/use-waypoint=waypoint")?;
    act.kubectl().words("wait -n bookinfo deployment --all --for=condition=Available --timeout=120s")?;
    act.wait("the waypoint of bookinfo", |act| {
        Ok(act.kubectl().words("wait -n bookinfo gateway/waypoint --for=condition=Programmed --timeout=1s").is_ok())
    })?;
    act.kubectl().rolled_out("bookinfo", "deployment/waypoint", super::act::PATIENCE)?;
    act.wait("the page with all its parts", |act| Ok(pages(act, "", 6)?.values().sum::<u32>() == 6))?;
    let seen = pages(act, "", 60)?;
    let detail = format!("60 pages: {seen:?}");
    act.check_measured("without rules all versions answer in turn", seen.len() == 3, detail);

    apply(act, "networking/destination-rule-all.yaml")?;
    apply(act, "networking/virtual-service-all-v1.yaml")?;
    expect(act, "all v1", "", "none")?;
    apply(act, "networking/virtual-service-reviews-test-v2.yaml")?;
    expect(act, "jason gets v2", "jason", "black")?;
    expect(act, "everyone else v1", "", "none")?;
    apply(act, "networking/virtual-service-ratings-test-delay.yaml")?;
    // 7 s of delay against productpage's patience of 3 s.
    expect(act, "a delay of ratings breaks jason's page", "jason", "broken")?;
    expect(act, "and nobody else's", "", "none")?;
    apply(act, "networking/virtual-service-all-v1.yaml")?;
    apply(act, "networking/virtual-service-reviews-50-v3.yaml")?;
    act.wait("the 50/50 split", |act| Ok(pages(act, "", 20)?.get("red").is_some_and(|red| *red > 0)))?;
    let seen = pages(act, "", 200)?;
    act.check_share("half of the pages have red stars (v3)", u64::from(*seen.get("red").unwrap_or(&0)), 200, 0.5);
    apply(act, "networking/virtual-service-reviews-v3.yaml")?;
    expect(act, "all v3", "", "red")?;
    act.kubectl().words("delete virtualservice,destinationrule -n bookinfo --all")?;
    apply(act, "gateway-api/route-reviews-90-10.yaml")?;
    act.wait("the HTTPRoute", |act| Ok(!pages(act, "", 30)?.contains_key("red")))?;
    let seen = pages(act, "", 200)?;
    act.check_share("HTTPRoute 90/10: v2's share", u64::from(*seen.get("black").unwrap_or(&0)), 200, 0.1);
    Ok(())
}

/// A file of the sample, as it is in Istio's module.
fn apply(act: &mut Act<'_>, file: &str) -> Result<()> {
    let path = act.cluster.state().join("istio/samples/bookinfo").join(file);
    act.type_this(format!("kubectl apply -n bookinfo -f samples/bookinfo/{file}"));
    act.kubectl().run(&["apply", "-n", "bookinfo", "-f", &path.display().to_string()]).map(drop)
}

/// Asks for the page until it looks as it must for this user.
fn expect(act: &mut Act<'_>, what: &str, user: &str, stars: &str) -> Result<()> {
    let arrived = act.wait(what, |act| Ok(pages(act, user, 4)?.get(stars) == Some(&4)));
    let count = if stars == "broken" { 3 } else { 20 };
    let seen = pages(act, user, count)?;
    let ok = arrived.is_ok() && seen.get(stars) == Some(&count);
    act.check_measured(what, ok, format!("{what}: {count} pages: {seen:?}"));
    Ok(())
}

/// Pages by the look of their reviews: `none`, `black` or `red` stars, or `broken`. Asked for from a pod of ratings, as
/// the sample's documentation does.
fn pages(act: &Act<'_>, user: &str, count: u32) -> Result<BTreeMap<String, u32>> {
    let script = format!(
        "i=0; while [ $i -lt {count} ]; do wget -qO- --header 'end-user: {user}' {PAGE} || echo unreachable; i=$((i+1)); done"
    );
    let pods = act.kubectl().get("pods -n bookinfo -l app=ratings")?;
    let pod = pods["items"][0]["metadata"]["name"].as_str().map(str::to_owned);
    let pod = pod.ok_or_else(|| LabError::Other("no pod of ratings".into()))?;
    let text = act.kubectl().exec("bookinfo", &pod, &["sh", "-c", &script])?;
    let mut seen = BTreeMap::new();
    for page in text.lines().filter(|line| line.contains("<html>") || line.contains("unreachable")) {
        let look = match page {
            page if !page.contains("Reviewer1") || page.contains("\"error\"") => "broken",
            page if page.contains("red") => "red",
            page if page.contains("black") => "black",
            _ => "none",
        };
        *seen.entry(look.to_owned()).or_default() += 1;
    }
    Ok(seen)
}
