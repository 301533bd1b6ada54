//! TLS from a waypoint to services that speak it themselves.
use strata_lab::{Call, LabError, Result};

use super::Own;
use super::act::Act;

pub(super) const SCENE: Own = Own {
    number: 17,
    title: "TLS to services that speak it",
    expect: "the waypoint speaks TLS to the API server for a ServiceEntry with a DestinationRule (roots from a Secret) and for a \
             Service with a BackendTLSPolicy (roots from a ConfigMap); a server of another name is refused, with the reason in \
             the answer",
    play,
};

fn play(act: &mut Act<'_>) -> Result<()> {
    act.governed()?;
    act.place("cluster/tls")?;
    let policy = "http://api.shop/version --timeout 2s";
    let answered = act.wait("requests through the BackendTLSPolicy", |act| Ok(act.call(CALLER, policy)?.ok == 1));
    check(act, "a Service with a BackendTLSPolicy answers", answered.is_ok(), policy)?;

    let entry = act.kubectl().get("serviceentry -n shop api")?;
    let Some(address) = entry["status"]["addresses"][0]["value"].as_str() else {
        return Err(LabError::Other(format!("istiod gave the ServiceEntry no address: {}", entry["status"])));
    };
    let rule = format!("http://{address}/version --host api.outside --timeout 2s");
    // Its roots are not there yet: nothing is sent in the meantime.
    let missing = act.wait("the answer to name the Secret", |act| {
        Ok(body(&act.call(CALLER, &rule)?).contains("secret kubernetes://api-ca-cacert has not come"))
    });
    check(act, "without its Secret the destination is closed, and the answer says why", missing.is_ok(), &rule)?;
    let ca = act.kubectl().get("configmap -n shop kube-root-ca.crt")?;
    let ca = ca["data"]["ca.crt"].as_str().unwrap_or_default().to_owned();
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "api-ca", "namespace": "shop" },
        "stringData": { "cacert": ca },
    });
    act.type_this("kubectl create secret -n shop generic api-ca --from-file=cacert=ca.pem");
    act.write("api-ca", &secret.to_string())?;
    let answered = act.wait("requests through the DestinationRule", |act| Ok(act.call(CALLER, &rule)?.ok == 1));
    check(act, "a ServiceEntry with a DestinationRule answers", answered.is_ok(), &rule)?;

    let of_another = SAMPLE_RULE.replace("NAME", "another.example");
    act.type_this("kubectl patch destinationrule -n shop api ... subjectAltNames: [another.example]");
    act.write("api-of-another", &of_another)?;
    let refused = act.wait("the answer to name the server's names", |act| {
        Ok(body(&act.call(CALLER, &rule)?).contains("none of its names is expected"))
    });
    check(act, "a server of another name is refused, and the answer says why", refused.is_ok(), &rule)
}

const CALLER: &str = "shop/checkout-1";

const SAMPLE_RULE: &str = "\
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: api, namespace: shop}
spec:
  host: api.outside
  trafficPolicy: {tls: {mode: SIMPLE, credentialName: api-ca, sni: kubernetes.default.svc, subjectAltNames: [NAME]}}
";

fn body(call: &Call) -> String {
    call.last.as_ref().map(|last| last["body"].to_string()).unwrap_or_default()
}

fn check(act: &mut Act<'_>, what: &str, ok: bool, arguments: &str) -> Result<()> {
    let call = act.call(CALLER, arguments)?;
    act.check(what, ok, format!("{:?} {}", call.status, body(&call)));
    Ok(())
}
