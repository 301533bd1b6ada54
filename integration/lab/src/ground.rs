//! What scenes need of the mesh they are played on: the lab, or a real cluster. The scenes are the same.
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use crate::{Capture, Lab, Result, Running};

/// A mesh of the shop on two nodes, `node-a` and `node-b`.
pub trait Ground: Sync {
    /// Puts objects in place on top of what is there, field by field. Another call with the same name replaces it.
    ///
    /// # Errors
    /// If they are refused.
    fn edit(&self, name: &str, yaml: &str) -> Result<()>;

    /// How long before [`Ground::edit`] returns a change may be in force: a command that saves it takes its time to end.
    fn lead(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// Takes an edit back: what it added goes, what it changed is as before. Nothing happens if it is not in place.
    ///
    /// # Errors
    /// If it cannot be taken back.
    fn remove_edit(&self, name: &str) -> Result<()>;

    /// What a person types to put a file of `manifests/samples/scenes` in place.
    fn typed(&self, file: &str) -> String;

    /// `GET path` of a process' admin interface as JSON: `agent-NODE`, `proxy-NODE`, or the waypoint `NAMESPACE/NAME`.
    ///
    /// # Errors
    /// If it does not answer with JSON.
    fn admin(&self, process: &str, path: &str) -> Result<Value>;

    /// The recent events of a process, oldest first: `/flows` of agents, `/requests` of proxies and waypoints.
    ///
    /// # Errors
    /// If it does not answer.
    fn events(&self, process: &str) -> Result<Vec<Value>>;

    /// Whether a waypoint of the shop has asked the control plane for its configuration.
    ///
    /// # Errors
    /// If it cannot be known.
    fn waypoint_connected(&self) -> Result<bool>;

    /// The JSON that `strata-echo` with these arguments prints inside a pod (`NAMESPACE/NAME`).
    ///
    /// # Errors
    /// If there is no such pod, or it prints something else.
    fn client(&self, pod: &str, args: &[&str]) -> Result<Value>;

    /// Starts `strata-echo ARGS` inside a pod and returns at once.
    ///
    /// # Errors
    /// If it cannot be started.
    fn spawn(&self, pod: &str, args: &[&str]) -> Result<Running>;

    /// Addresses of a pod, IPv4 first.
    ///
    /// # Errors
    /// If it is not running.
    fn pod_ips(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>>;

    /// The nodes' names.
    fn nodes(&self) -> Vec<String>;

    /// Runs a program in a node's network namespace; what it prints.
    ///
    /// # Errors
    /// If it fails.
    fn on_node(&self, node: &str, command: &[&str]) -> Result<String>;

    /// Captures the link between the nodes.
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    fn capture_link(&self) -> Result<Capture>;

    /// A token of the issuer at 203.0.113.20: the arguments of `strata-echo token` without `--keys`.
    ///
    /// # Errors
    /// If it cannot be minted.
    fn token(&self, args: &[&str]) -> Result<String>;

    /// The lab, for scenes about its processes.
    fn lab(&self) -> Option<&Lab> {
        None
    }
}

/// Where a user of `strata up` puts what overlays the folder it was started with.
const EDITS: &str = "/run/strata-lab/up/edits/";

impl Ground for Lab {
    fn edit(&self, name: &str, yaml: &str) -> Result<()> {
        Lab::edit(self, name, yaml)
    }

    fn remove_edit(&self, name: &str) -> Result<()> {
        Lab::remove_edit(self, name)
    }

    fn typed(&self, file: &str) -> String {
        format!("cp manifests/samples/scenes/{file} {EDITS}")
    }

    fn admin(&self, process: &str, path: &str) -> Result<Value> {
        Lab::admin(self, process, path)
    }

    fn events(&self, process: &str) -> Result<Vec<Value>> {
        Lab::events(self, process)
    }

    fn waypoint_connected(&self) -> Result<bool> {
        let status = Lab::admin(self, "control", "/status")?;
        let mut clients = status["clients"].as_array().into_iter().flatten();
        Ok(clients.any(|client| client["node"].as_str().is_some_and(|node| node.starts_with("waypoint~"))))
    }

    fn client(&self, pod: &str, args: &[&str]) -> Result<Value> {
        Lab::client(self, pod, args)
    }

    fn spawn(&self, pod: &str, args: &[&str]) -> Result<Running> {
        Lab::spawn(self, pod, args)
    }

    fn pod_ips(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        Lab::pod_ips(self, namespace, name)
    }

    fn nodes(&self) -> Vec<String> {
        self.description().nodes.iter().map(|node| node.name.clone()).collect()
    }

    fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        let node = self.description().nodes.iter().find(|known| known.name == node);
        let node = node.ok_or_else(|| crate::LabError::other("no such node"))?;
        let netns = format!("--net={}", node.netns.display());
        crate::sys::run("nsenter", &[&[netns.as_str()], command].concat())
    }

    fn capture_link(&self) -> Result<Capture> {
        Lab::capture_link(self)
    }

    fn token(&self, args: &[&str]) -> Result<String> {
        Lab::token(self, args)
    }

    fn lab(&self) -> Option<&Lab> {
        Some(self)
    }
}
