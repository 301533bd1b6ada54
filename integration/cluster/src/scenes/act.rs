//! What every scene of a cluster's own stands on.
use std::time::Duration;

use strata_lab::scenes::{Record, Report};
use strata_lab::{Call, Ground as _, LabError, Result, Running};

use super::Own;
use crate::{Cluster, Kubectl, repository};

/// For what has no other limit. Not what is promised: what is promised is measured.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The pieces of manifests/samples/scenes that make the shop governed, in order.
const GOVERNED: [&str; 3] = ["ambient", "subsets", "waypoint"];

/// A scene being played.
pub(super) struct Act<'c> {
    pub(super) cluster: &'c Cluster,
    record: Record,
    placed: Vec<String>,
}

impl std::ops::Deref for Act<'_> {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl std::ops::DerefMut for Act<'_> {
    fn deref_mut(&mut self) -> &mut Record {
        &mut self.record
    }
}

impl<'c> Act<'c> {
    pub(super) fn new(cluster: &'c Cluster, scene: &Own) -> Act<'c> {
        Act { cluster, record: Record::new(scene.number, scene.title, scene.expect), placed: Vec::new() }
    }

    /// Takes away what was put in place.
    pub(super) fn end(mut self) -> Report {
        for name in std::mem::take(&mut self.placed).into_iter().rev() {
            if let Err(error) = self.cluster.remove_edit(&name) {
                self.check("what the scene put in place could be taken away", false, error.to_string());
            }
        }
        self.record.report()
    }

    pub(super) fn kubectl(&self) -> &'c Kubectl {
        self.cluster.kubectl()
    }

    /// Puts YAML in place until the scene ends.
    pub(super) fn write(&mut self, name: &str, yaml: &str) -> Result<()> {
        self.cluster.edit(name, yaml)?;
        if !self.placed.iter().any(|placed| placed == name) {
            self.placed.push(name.to_owned());
        }
        Ok(())
    }

    /// A file of manifests/samples (`scenes/ambient`, `cluster/orders`).
    pub(super) fn place(&mut self, name: &str) -> Result<()> {
        let path = repository().join(format!("manifests/samples/{name}.yaml"));
        let text = std::fs::read_to_string(&path)
            .map_err(|source| LabError::Io { what: path.display().to_string(), source })?;
        self.type_this(format!("kubectl apply --server-side -f manifests/samples/{name}.yaml"));
        self.write(&name.replace('/', "-"), &text)
    }

    /// Takes a file away again.
    pub(super) fn remove(&mut self, name: &str) -> Result<()> {
        let name = name.replace('/', "-");
        self.placed.retain(|placed| *placed != name);
        self.cluster.remove_edit(&name)
    }

    /// The shop is in the mesh.
    pub(super) fn meshed(&mut self) -> Result<()> {
        self.place("scenes/ambient")?;
        self.wait("all pods of the shop to be enrolled", |act| {
            let pods = act.kubectl().get("pods -n shop -l app")?;
            let items = pods["items"].as_array().cloned().unwrap_or_default();
            Ok(items.iter().all(|pod| pod["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"))
        })
    }

    /// The shop is in the mesh and payments is governed by the waypoint.
    pub(super) fn governed(&mut self) -> Result<()> {
        self.meshed()?;
        for piece in &GOVERNED[1..] {
            self.place(&format!("scenes/{piece}"))?;
        }
        self.wait("the waypoint to be ready", |act| act.cluster.waypoint_connected())?;
        self.wait("requests to payments to go through the waypoint", |act| {
            let call = act.call("shop/checkout-1", "http://payments.shop/governed --count 5 --timeout 2s")?;
            let seen = act.cluster.events("shop/waypoint")?;
            Ok(call.ok == 5 && seen.iter().any(|event| event["path"] == "/governed"))
        })
    }

    pub(super) fn wait(&self, what: &str, mut look: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        self.kubectl().wait(what, PATIENCE, |_| look(self)).map(drop)
    }

    /// `strata-echo call` in a pod (`NAMESPACE/NAME`), arguments separated by blanks.
    pub(super) fn call(&self, pod: &str, arguments: &str) -> Result<Call> {
        let words: Vec<&str> = std::iter::once("call").chain(arguments.split_whitespace()).collect();
        let printed = self.cluster.client(pod, &words)?;
        serde_json::from_value(printed).map_err(LabError::other)
    }

    /// A call that goes on in the background.
    pub(super) fn spawn(&self, pod: &str, arguments: &str) -> Result<Running> {
        let words: Vec<&str> = std::iter::once("call").chain(arguments.split_whitespace()).collect();
        self.cluster.spawn(pod, &words)
    }
}
