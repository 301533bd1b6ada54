//! The kubelet's probes, and pods of every kind, under policies that let nobody else in.
use strata_lab::{Ground as _, Result};

use super::Own;
use super::act::Act;

pub(super) const SCENE: Own = Own {
    number: 11,
    title: "Probes under STRICT and deny-all, init containers, pods of the node's network",
    expect: "HTTP, TCP, gRPC and exec probes succeed for pods in and outside the mesh under policies that let nobody in; init \
             containers reach DNS and the API server; a hostNetwork pod is served and not captured; everybody else is refused",
    play,
};

fn play(act: &mut Act<'_>) -> Result<()> {
    act.meshed()?;
    act.place("cluster/probes")?;
    for namespace in ["sealed", "plain"] {
        act.kubectl().rolled_out(namespace, "daemonset/probed", super::act::PATIENCE)?;
    }
    act.kubectl().words("wait -n sealed pod hostnet --for=condition=Ready --timeout=60s")?;
    // Probes run every second: what they break would have been seen.
    std::thread::sleep(std::time::Duration::from_secs(5));
    for (namespace, meshed) in [("sealed", true), ("plain", false)] {
        let pods = act.kubectl().get(&format!("pods -n {namespace} -l app=probed"))?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        let containers: Vec<_> = items
            .iter()
            .flat_map(|pod| pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default())
            .collect();
        let ready = containers.iter().filter(|c| c["ready"] == true && c["restartCount"] == 0).count();
        act.check_measured(
            &format!("{namespace}: every probe succeeds"),
            containers.len() == 4 && ready == 4,
            format!("{namespace}: {ready} of {} containers ready, none restarted", containers.len()),
        );
        let enrolled = items
            .iter()
            .filter(|pod| pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled")
            .count();
        let expected = if meshed { items.len() } else { 0 };
        let detail = format!("{namespace}: {enrolled} of {} pods have ambient.istio.io/redirection", items.len());
        act.check_measured(
            &format!("{namespace}: annotated when and only when captured"),
            enrolled == expected,
            detail,
        );
        for pod in &items {
            let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
            let call =
                act.call("shop/checkout-1", &format!("http://{ip}:8080/ --count 3 --new-connection --timeout 1s"))?;
            act.check(&format!("{namespace}: nobody else is let in"), call.ok == 0, call.brief());
        }
    }
    hostnet(act)
}

fn hostnet(act: &mut Act<'_>) -> Result<()> {
    let pod = act.kubectl().get("pod -n sealed hostnet")?;
    let annotated = !pod["metadata"]["annotations"]["ambient.istio.io/redirection"].is_null();
    act.check("a pod of the node's network is not captured", !annotated, "no annotation");
    let ip = act.cluster.pod_ips("sealed", "hostnet")?.first().map(ToString::to_string).unwrap_or_default();
    let call = act.call("shop/checkout-1", &format!("http://{ip}:18080/ --count 5 --new-connection --timeout 2s"))?;
    act.check_measured("and is reached from the mesh", call.ok == 5, format!("hostNetwork pod: {}", call.brief()));
    let out =
        act.call("sealed/hostnet", "http://frontend.shop.svc.cluster.local/ --count 5 --new-connection --timeout 2s")?;
    act.check_measured("and reaches services by name", out.ok == 5, format!("from it: {}", out.brief()));
    Ok(())
}
