//! Executes the CNI plugin as a container runtime does: environment, configuration on standard input, JSON out.
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::error::Doing;
use crate::{LabError, Result, process};

/// One pod's sandbox and the node it is on.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub plugin: PathBuf,
    pub node_netns: PathBuf,
    pub node_cgroup: PathBuf,
    pub agent_socket: PathBuf,
    pub container_id: String,
    pub netns: PathBuf,
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl Call {
    /// ADD; the addresses the pod got.
    ///
    /// # Errors
    /// What the plugin said.
    pub(crate) fn add(&self) -> Result<Vec<IpAddr>> {
        let result = self.execute("ADD")?;
        let ips = result["ips"].as_array().cloned().unwrap_or_default();
        let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
        let addresses: Vec<IpAddr> = ips.iter().filter_map(address).collect();
        if addresses.is_empty() {
            return Err(LabError::Other(format!(
                "CNI ADD of {}/{} gave no address: {result}",
                self.namespace, self.name
            )));
        }
        Ok(addresses)
    }

    /// DEL.
    ///
    /// # Errors
    /// What the plugin said.
    pub(crate) fn del(&self) -> Result<()> {
        self.execute("DEL").map(|_| ())
    }

    fn execute(&self, what: &str) -> Result<Value> {
        let config =
            json!({"cniVersion": "1.1.0", "name": "strata", "type": "strata-cni", "agentSocket": self.agent_socket});
        let mut command = process::command(&self.plugin, &self.node_netns, &self.node_cgroup)?;
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.container_id, self.uid
        );
        command.env_clear().envs([
            ("CNI_COMMAND", what),
            ("CNI_CONTAINERID", &self.container_id),
            ("CNI_IFNAME", "eth0"),
        ]);
        command.env("CNI_NETNS", &self.netns).env("CNI_ARGS", args);
        command.env("CNI_PATH", self.plugin.parent().unwrap_or(Path::new("/")));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().doing(self.plugin.display())?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(config.to_string().as_bytes()).doing("CNI configuration")?;
        }
        let output = child.wait_with_output().doing("CNI plugin")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(LabError::Command {
                command: format!("CNI {what} of {}/{}", self.namespace, self.name),
                output: format!("{} {}", text.trim(), String::from_utf8_lossy(&output.stderr).trim()),
            });
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}
