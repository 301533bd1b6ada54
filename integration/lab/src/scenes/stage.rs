//! What every scene stands on: YAML in and out of place, traffic from pods, waiting, and the report as it grows.
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;

use super::{Record, Report, Scene, capture};
use crate::client::{Call, Connect, Running};
use crate::error::Doing;
use crate::{Ground, Lab, LabError, Result};

/// How long anything may take to come into force before the scene gives up. Not what is promised: what is promised
/// is measured.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Addresses of manifests/samples/shop.
pub(super) const PAYMENTS: &str = "10.96.1.20";
pub(super) const PAYMENTS_V6: &str = "fd00:96::120";
pub(super) const EMPTY: &str = "10.96.1.99";
/// The bank's gateway, outside the cluster.
pub(super) const BANK: &str = "203.0.113.10";
/// Pods that are enrolled when the namespace is; the waypoint opts out.
const SHOP_PODS: [&str; 5] = ["frontend-1", "checkout-1", "payments-v1-a", "payments-v1-b", "payments-v2-b"];

/// Where one file of manifests/samples/scenes is, at build time.
macro_rules! piece {
    ($name:literal) => {
        ($name, include_str!(concat!("../../../../manifests/samples/scenes/", $name, ".yaml")))
    };
}
/// The YAML pieces of manifests/samples/scenes.
const PIECES: [(&str, &str); 24] = [
    piece!("ambient"),
    piece!("canary-0-100"),
    piece!("canary-50-50"),
    piece!("canary-90-10"),
    piece!("claim-route"),
    piece!("fault-abort"),
    piece!("fault-delay"),
    piece!("frontend-as-checkout"),
    piece!("header"),
    piece!("http-route"),
    piece!("jwt"),
    piece!("l4-authorization"),
    piece!("mirror"),
    piece!("no-retries"),
    piece!("outlier"),
    piece!("policy"),
    piece!("policy-open"),
    piece!("retries"),
    piece!("strict"),
    piece!("subsets"),
    piece!("timeout"),
    piece!("v1-only"),
    piece!("waypoint"),
    piece!("authorization"),
];

/// A scene being played.
pub(super) struct Stage<'l> {
    pub(super) ground: &'l dyn Ground,
    record: Record,
    placed: Vec<String>,
}

impl std::ops::Deref for Stage<'_> {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl std::ops::DerefMut for Stage<'_> {
    fn deref_mut(&mut self) -> &mut Record {
        &mut self.record
    }
}

impl<'l> Stage<'l> {
    pub(super) fn new(ground: &'l dyn Ground, scene: &Scene) -> Stage<'l> {
        Stage { ground, record: Record::new(scene.number, scene.title, scene.expect), placed: Vec::new() }
    }

    /// Clears what another scene or a user left in place.
    pub(super) fn start(&mut self) -> Result<()> {
        for (name, _) in PIECES {
            self.ground.remove_edit(&file_name(name))?;
        }
        self.wait("payments to be reached on every endpoint", |stage| {
            let call =
                stage.call("checkout-1", &format!("http://{PAYMENTS}/ --count 30 --new-connection --timeout 1s"))?;
            Ok(call.ok == 30 && call.servers.len() == 3)
        })
    }

    /// Takes away what was put in place.
    pub(super) fn end(mut self) -> Report {
        for name in std::mem::take(&mut self.placed) {
            if let Err(error) = self.ground.remove_edit(&file_name(&name)) {
                self.check("what the scene put in place could be taken away", false, error.to_string());
            }
        }
        self.record.report()
    }

    // ---- YAML ----

    /// Puts a piece of manifests/samples/scenes in place. The time at which it was saved.
    pub(super) fn place(&mut self, name: &str) -> Result<SystemTime> {
        let text = PIECES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
        let text = text.ok_or_else(|| LabError::other(format!("no piece {name:?}")))?;
        let typed = self.ground.typed(&format!("{name}.yaml"));
        self.type_this(typed);
        self.write(name, text)
    }

    /// Puts YAML of the scene's own in place, under a piece's name.
    pub(super) fn write(&mut self, name: &str, text: &str) -> Result<SystemTime> {
        self.ground.edit(&file_name(name), text)?;
        if !self.placed.iter().any(|placed| placed == name) {
            self.placed.push(name.to_owned());
        }
        Ok(SystemTime::now())
    }

    /// Takes a piece away again. The time at which it was gone.
    pub(super) fn remove(&mut self, name: &str) -> Result<SystemTime> {
        self.placed.retain(|placed| placed != name);
        self.ground.remove_edit(&file_name(name))?;
        Ok(SystemTime::now())
    }

    /// A piece's text with replacements.
    pub(super) fn text_of(name: &str) -> &'static str {
        PIECES.iter().find(|(known, _)| *known == name).map_or("", |(_, text)| *text)
    }

    // ---- states of the shop ----

    /// No pod of the shop is in the mesh.
    pub(super) fn unmeshed(&mut self) -> Result<()> {
        if self.placed.iter().any(|name| name == "ambient") {
            self.remove("ambient")?;
        }
        self.wait("the shop to be outside the mesh", |stage| Ok(stage.enrolled()?.is_empty()))
    }

    /// Every pod of the shop is in the mesh.
    pub(super) fn meshed(&mut self) -> Result<()> {
        self.place("ambient")?;
        self.wait("all pods of the shop to be enrolled", |stage| {
            let enrolled = stage.enrolled()?;
            Ok(SHOP_PODS.iter().all(|pod| enrolled.iter().any(|name| name == pod)))
        })?;
        self.wait("the proxies to have every certificate", |stage| {
            for node in stage.ground.nodes() {
                let status = stage.ground.admin(&format!("proxy-{node}"), "/status")?;
                let mut certificates = status["certificates"].as_array().into_iter().flatten();
                if !certificates.all(|certificate| certificate["state"] == "Available") {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// The shop is in the mesh and requests to payments go through the waypoint.
    pub(super) fn governed(&mut self) -> Result<()> {
        self.meshed()?;
        self.place("subsets")?;
        self.place("waypoint")?;
        self.wait("the waypoint to be configured", |stage| stage.ground.waypoint_connected())?;
        self.wait("requests to payments to go through the waypoint", |stage| {
            let path = format!("/governed-{:.0}", millis(SystemTime::now()));
            let call = stage.call("checkout-1", &format!("http://{PAYMENTS}{path} --timeout 2s"))?;
            // The waypoint tells of a request when it has ended.
            std::thread::sleep(LOOK);
            let events = stage.ground.events("shop/waypoint-1")?;
            Ok(call.ok == 1 && events.iter().any(|event| event["path"] == path.as_str()))
        })
    }

    /// Names of the shop's pods that are enrolled.
    pub(super) fn enrolled(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for node in self.ground.nodes() {
            let status = self.ground.admin(&format!("agent-{node}"), "/status")?;
            let pods = status["pods"].as_array().cloned().unwrap_or_default();
            let pods = pods.iter().filter(|pod| pod["mesh"]["enrolled"] == true);
            names.extend(pods.filter_map(|pod| pod["name"].as_str().map(str::to_owned)));
        }
        Ok(names)
    }

    // ---- traffic ----

    /// `strata-echo call` in a pod of the shop (or `NAMESPACE/POD`), arguments separated by blanks.
    pub(super) fn call(&self, pod: &str, arguments: &str) -> Result<Call> {
        self.client(pod, "call", arguments)
    }

    /// `strata-echo connect`.
    pub(super) fn connect(&self, pod: &str, arguments: &str) -> Result<Connect> {
        self.client(pod, "connect", arguments)
    }

    /// Any command of strata-echo that prints JSON.
    pub(super) fn client<T: DeserializeOwned>(&self, pod: &str, command: &str, arguments: &str) -> Result<T> {
        let printed = self.ground.client(&full(pod), &borrowed(&words(command, arguments)))?;
        serde_json::from_value(printed).map_err(|error| LabError::other(format!("strata-echo {command}: {error}")))
    }

    /// A command of strata-echo that goes on in the background.
    pub(super) fn spawn(&self, pod: &str, command: &str, arguments: &str) -> Result<Running> {
        self.ground.spawn(&full(pod), &borrowed(&words(command, arguments)))
    }

    /// A pod's address.
    pub(super) fn ip(&self, pod: &str, v6: bool) -> Result<IpAddr> {
        let (namespace, name) = split(&full(pod));
        let ips = self.ground.pod_ips(&namespace, &name)?;
        let found = ips.into_iter().find(|ip| ip.is_ipv6() == v6);
        found.ok_or_else(|| LabError::other(format!("{pod} has no such address")))
    }

    // ---- looking ----

    /// The lab, in scenes about its processes.
    pub(super) fn lab(&self) -> Result<&'l Lab> {
        self.ground.lab().ok_or_else(|| LabError::other("this scene is about the lab's own processes"))
    }

    /// Waits for something to become true.
    pub(super) fn wait(&self, what: &str, look: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        self.time_until(what, look).map(|_| ())
    }

    /// How long it took to become true.
    pub(super) fn time_until(&self, what: &str, mut look: impl FnMut(&Self) -> Result<bool>) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let seen = look(self);
            if matches!(seen, Ok(true)) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > PATIENCE {
                let detail = seen.err().map(|error| format!(": {error}")).unwrap_or_default();
                return Err(LabError::Timeout { what: what.to_owned(), seconds: PATIENCE.as_secs(), detail });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Runs a program in a node's network namespace.
    pub(super) fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        self.ground.on_node(node, command)
    }

    /// Captures the link between the nodes while `work` is done.
    pub(super) fn captured<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<(T, Vec<capture::Segment>)> {
        let recording = self.ground.capture_link()?;
        let done = work(self)?;
        let file = recording.stop()?;
        let bytes = std::fs::read(&file).doing(file.display())?;
        Ok((done, capture::tcp_segments(&bytes).map_err(LabError::other)?))
    }
}

/// Milliseconds since 1970, as strata-echo's samples count.
pub(super) fn millis(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1e3
}

fn file_name(piece: &str) -> String {
    format!("scene-{piece}.yaml")
}

fn full(pod: &str) -> String {
    if pod.contains('/') { pod.to_owned() } else { format!("shop/{pod}") }
}

fn split(pod: &str) -> (String, String) {
    let (namespace, name) = pod.split_once('/').unwrap_or(("shop", pod));
    (namespace.to_owned(), name.to_owned())
}

/// Arguments are separated by blanks; `~` is a blank inside of one (`-H authorization:Bearer~TOKEN`).
fn words(command: &str, arguments: &str) -> Vec<String> {
    std::iter::once(command).chain(arguments.split_whitespace()).map(|word| word.replace('~', " ")).collect()
}

fn borrowed(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    use compat_objects::HasMeta;
    use compat_objects::source::DirectorySource;

    use super::*;

    fn samples() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/samples")
    }

    fn faults(folders: Vec<PathBuf>) -> Vec<String> {
        DirectorySource::new(folders).load().faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_shop_is_read_without_a_fault() {
        assert_eq!(faults(vec![samples().join("shop")]), Vec::<String>::new());
        let snapshot = DirectorySource::new(vec![samples().join("shop")]).load();
        let pods: BTreeSet<String> = snapshot.objects.pods().map(|pod| pod.name().to_owned()).collect();
        assert!(SHOP_PODS.iter().all(|pod| pods.contains(*pod)), "{pods:?}");
        let address = |name: &str| {
            let service = snapshot.objects.services().find(|service| service.name() == name).unwrap();
            service.spec.as_ref().unwrap().cluster_ips.clone().unwrap()
        };
        assert_eq!(address("payments"), [PAYMENTS, PAYMENTS_V6]);
        assert_eq!(address("empty")[0], EMPTY);
    }

    #[test]
    fn every_piece_is_read_without_a_fault_on_top_of_the_shop() {
        let mut files = BTreeSet::new();
        for entry in std::fs::read_dir(samples().join("scenes")).unwrap().flatten() {
            assert_eq!(faults(vec![samples().join("shop"), entry.path()]), Vec::<String>::new());
            files.insert(entry.path().file_stem().unwrap().to_str().unwrap().to_owned());
        }
        let known: BTreeSet<String> = PIECES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(files, known, "what the scenes know and what is in the folder");
    }
}
