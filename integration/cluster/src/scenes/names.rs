//! The mesh's names in pods' DNS.
use strata_lab::{LabError, Result};

use super::Own;
use super::act::Act;

pub(super) const SCENE: Own = Own {
    number: 19,
    title: "The mesh's names",
    expect: "a meshed pod finds a ServiceEntry's host by a name no DNS server knows, a pod outside the mesh does not; without the \
             cluster's DNS meshed pods go on finding services by name",
    play,
};

const MESHED: &str = "shop/checkout-1";
const UNMESHED: &str = "outside/gateway-1";
const PARTNER: &str = "http://partner.example.com/ --timeout 3s";
const PAYMENTS: &str = "http://payments.shop/ --count 20 --new-connection --timeout 3s";

fn play(act: &mut Act<'_>) -> Result<()> {
    act.meshed()?;
    act.place("cluster/mesh-names")?;
    let found = act.wait("the host to be found", |act| Ok(act.call(MESHED, PARTNER)?.ok == 1));
    let call = act.call(MESHED, PARTNER)?;
    act.type_this(format!("in {MESHED}: curl {PARTNER}"));
    act.check("a meshed pod finds the ServiceEntry's host by its name", found.is_ok(), call.brief());
    let unknown = unknown_to(act, UNMESHED, PARTNER)?;
    act.check("a pod outside the mesh does not know the name", unknown, UNMESHED);

    let deployment = act.kubectl().get("deployment -n kube-system coredns")?;
    let replicas = format!("--replicas={}", deployment["spec"]["replicas"]);
    act.type_this("kubectl scale -n kube-system deployment coredns --replicas=0");
    let outcome = without_dns(act);
    act.kubectl().run(&["scale", "-n", "kube-system", "deployment", "coredns", &replicas])?;
    act.kubectl().run(&["rollout", "status", "-n", "kube-system", "deployment", "coredns", "--timeout=120s"])?;
    outcome
}

fn without_dns(act: &mut Act<'_>) -> Result<()> {
    act.kubectl().run(&["scale", "-n", "kube-system", "deployment", "coredns", "--replicas=0"])?;
    let gone = act.wait("the cluster's DNS to be gone", |act| unknown_to(act, UNMESHED, PAYMENTS));
    act.check("a pod outside the mesh finds no service by name", gone.is_ok(), UNMESHED);
    let call = act.call(MESHED, PAYMENTS)?;
    act.check("a meshed pod finds payments by its name", call.ok == 20, call.brief());
    Ok(())
}

/// Whether the pod finds nobody by the name it is to call.
fn unknown_to(act: &Act<'_>, pod: &str, call: &str) -> Result<bool> {
    match act.call(pod, call) {
        Ok(_) => Ok(false),
        // What getaddrinfo(3) says.
        Err(LabError::Command { output, .. }) if output.contains("failed to lookup address information") => Ok(true),
        Err(error) => Err(error),
    }
}
