//! Mistakes: each is named where it was made, and nothing else suffers.
use serde_json::Value;
use strata_lab::{Call, LabError, Result};

use super::Own;
use super::act::Act;
use crate::SYSTEM;

pub(super) const SCENE: Own = Own {
    number: 16,
    title: "Mistakes are named, and nothing else suffers",
    expect: "a Gateway of an unknown class, a token of the wrong audience, a root that did not sign, a second agent on a node, \
             pods deleted while they come, a node that claims another's addresses: the object or one process's log says so, \
             and no request between others fails",
    play,
};

const BY_HAND: &str = include_str!("../../../../manifests/samples/cluster/waypoint-by-hand.yaml");
const FLEETING: usize = 8;

fn play(act: &mut Act<'_>) -> Result<()> {
    act.governed()?;
    let flags = "http://payments.shop/ --count 0 --rate 50 --new-connection --timeout 3s";
    let running = act.spawn("shop/checkout-1", flags)?;
    unknown_class(act)?;
    // Both run as waypoints of another name, which nothing goes through.
    refused_by_istiod(act, "audience", &[("audience: istio-ca", "audience: somebody-else")], "authentic")?;
    let root = (
        "configMap: {name: istio-ca-root-cert}",
        "configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: root-cert.pem}]}",
    );
    refused_by_istiod(act, "root", &[root], "UnknownIssuer")?;
    second_agent(act)?;
    fleeting_pods(act)?;
    claimed_range(act)?;
    let call: Call = running.finish()?;
    let detail = format!("meanwhile, checkout to payments: {}", call.brief());
    act.check_measured("no request between others fails", call.failed() == 0 && call.sent > 200, detail);
    Ok(())
}

fn unknown_class(act: &mut Act<'_>) -> Result<()> {
    let yaml = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: stray, namespace: shop}\n\
                spec:\n  gatewayClassName: strata-waypoint\n  listeners: [{name: mesh, port: 15008, protocol: HBONE}]\n";
    act.type_this("kubectl apply ... Gateway of class strata-waypoint");
    act.write("stray-gateway", yaml)?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let gateway = act.kubectl().get("gateway -n shop stray")?;
    let conditions = gateway["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let programmed = conditions.iter().any(|c| c["type"] == "Programmed" && c["status"] == "True");
    let made = act.kubectl().words("get deployment -n shop stray").is_ok();
    act.check(
        "a Gateway of an unknown class says that nobody programmed it",
        !conditions.is_empty() && !programmed && !made,
        gateway["status"].to_string(),
    );
    Ok(())
}

/// A waypoint with something wrong about its trust: not Ready, and its log says why.
fn refused_by_istiod(act: &mut Act<'_>, what: &str, wrong: &[(&str, &str)], reason: &str) -> Result<()> {
    let name = format!("wrong-{what}");
    let mut yaml = BY_HAND.replace("handmade", &name);
    for (right, wrong) in wrong {
        yaml = yaml.replace(right, wrong);
    }
    act.type_this(format!("kubectl apply ... a waypoint with a wrong {what}"));
    act.write(&name, &yaml)?;
    let label = format!("gateway.networking.k8s.io/gateway-name={name}");
    let mut log = String::new();
    let said = act.kubectl().wait(&format!("{name} to say why"), super::act::PATIENCE, |kubectl| {
        log = kubectl.words(&format!("logs -n shop -l {label} --tail=40"))?;
        Ok(log.to_lowercase().contains(&reason.to_lowercase()))
    });
    let deployment = act.kubectl().get(&format!("deployment -n shop {name}"))?;
    let ready = deployment["status"]["readyReplicas"].as_u64().unwrap_or(0);
    let last =
        log.lines().rfind(|line| line.to_lowercase().contains(&reason.to_lowercase())).unwrap_or(&log).to_owned();
    act.check_measured(
        &format!("a waypoint with a wrong {what} is never Ready and says why"),
        said.is_ok() && ready == 0,
        format!("wrong {what}: {last}"),
    );
    act.remove(&name)
}

fn second_agent(act: &mut Act<'_>) -> Result<()> {
    let binaries = std::env::var_os("STRATA_BIN").map(std::path::PathBuf::from);
    let binaries = binaries.unwrap_or_else(|| crate::repository().join("target/debug"));
    let binary = binaries.join("strata-agent").display().to_string();
    let kubeconfig = act.cluster.state().join("run/admin.kubeconfig").display().to_string();
    let arguments =
        ["a", "timeout", "20", &binary, "--node-name", "node-a", "--source", "kubernetes", "--kubeconfig", &kubeconfig];
    act.type_this("strata-agent --node-name node-a ...   (a second one on node-a)");
    let answer = act.cluster.script("on-node.sh", &arguments);
    let said = answer.as_ref().err().map(ToString::to_string).unwrap_or_default();
    act.check(
        "a second agent on a node is refused by name",
        said.contains("another agent runs on this run folder"),
        if said.is_empty() { "it was not refused".to_owned() } else { said },
    );
    Ok(())
}

fn fleeting_pods(act: &mut Act<'_>) -> Result<()> {
    act.type_this("kubectl run ...; kubectl delete pod --force   (before it runs)");
    let pod = |number: usize| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: fleeting-{number}, namespace: shop, labels: {{app: fleeting}}}}\n\
             spec:\n  nodeName: node-b\n  terminationGracePeriodSeconds: 0\n\
             \x20 containers: [{{name: app, image: \"strata.io/echo:dev\", args: [serve, --http, \"8080\"]}}]\n"
        )
    };
    for number in 0..FLEETING {
        act.kubectl().apply("fleeting", &pod(number))?;
        // A little later each time: before the sandbox, while it is wired, while it is enrolled.
        std::thread::sleep(std::time::Duration::from_millis(150 * number as u64));
        act.kubectl().words(&format!("delete pod -n shop fleeting-{number} --force --grace-period=0"))?;
    }
    let gone = act.wait("the agent to have forgotten them", |act| {
        let status: Value =
            serde_json::from_str(&act.cluster.ask("agent-node-b", "/status")?).map_err(LabError::other)?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let left = pods.iter().any(|pod| pod["name"].as_str().is_some_and(|name| name.starts_with("fleeting")));
        Ok(!left && status["ready"] == true)
    });
    act.kubectl().apply("fleeting", &pod(FLEETING))?;
    let fresh =
        act.kubectl().words(&format!("wait -n shop pod/fleeting-{FLEETING} --for=condition=Ready --timeout=60s"));
    act.kubectl().words("delete pod -n shop -l app=fleeting --force --grace-period=0")?;
    let detail = [gone.err().map(|e| e.to_string()), fresh.err().map(|e| e.to_string())];
    let detail: Vec<String> = detail.into_iter().flatten().collect();
    act.check("pods deleted while they come leave nothing", detail.is_empty(), detail.join("; "));
    Ok(())
}

fn claimed_range(act: &mut Act<'_>) -> Result<()> {
    act.type_this("kubectl apply ... Node intruder with node-b's podCIDR");
    let range = act.kubectl().get("node node-b")?["spec"]["podCIDR"].as_str().unwrap_or_default().to_owned();
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: intruder}}\nspec: {{podCIDR: {range}, podCIDRs: [{range}]}}\n"
    );
    act.write("intruder", &node)?;
    let address = r#"{"status":{"addresses":[{"type":"InternalIP","address":"10.99.0.99"}]}}"#;
    act.kubectl().run(&["patch", "node", "intruder", "--subresource=status", "--type=merge", "-p", address])?;
    let named = act.wait("the agent to name the intruder", |act| {
        let status = act.cluster.ask("agent-node-a", "/status")?;
        Ok(status.contains("overlaps") && status.contains("Node intruder"))
    });
    let call = act.call("shop/checkout-1", "http://payments.shop/ --count 40 --new-connection --timeout 2s")?;
    act.check_measured(
        "a node that claims another's addresses is named and gets no packet",
        named.is_ok() && call.ok == 40,
        format!("beside the intruder: {}", call.brief()),
    );
    let log = act.kubectl().words(&format!("logs -n {SYSTEM} -l app.kubernetes.io/name=strata-agent --tail=200"))?;
    act.check("and the agents' logs say so", log.contains("overlaps"), log);
    act.remove("intruder")
}
