//! What the runtime gives: the environment and the network configuration on standard input.
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::protocol::{AttachmentId, Failure, PodName};
use crate::{Version, code};

/// Where the agent listens unless the configuration says otherwise.
const DEFAULT_SOCKET: &str = "/run/strata/cni.sock";

/// The variables of the specification, as given.
pub(crate) struct Environment<'a>(pub(crate) &'a dyn Fn(&str) -> Option<String>);

/// The part of the network configuration this plugin reads; the rest is other plugins' or the runtime's.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(default)]
    name: String,
    #[serde(rename = "agentSocket", default)]
    agent_socket: Option<PathBuf>,
    /// Kept as read, so that a chained call returns it without loss.
    #[serde(rename = "prevResult", default)]
    pub(crate) previous: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    pub(crate) valid: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

impl From<ValidAttachment> for AttachmentId {
    fn from(valid: ValidAttachment) -> AttachmentId {
        AttachmentId { container_id: valid.container_id, ifname: valid.ifname }
    }
}

impl Config {
    pub(crate) fn read(text: &str) -> Result<Config, Failure> {
        let failed = |error| Failure::new(code::DECODE, "network configuration is not valid JSON").because(error);
        serde_json::from_str(text).map_err(failed)
    }

    /// The version the answer must be in.
    pub(crate) fn version(&self) -> Result<Version, Failure> {
        // A configuration without one means 0.1.0 (specification, "Network configuration format").
        let text = if self.version.is_empty() { "0.1.0" } else { &self.version };
        Version::parse(text).ok_or_else(|| {
            let supported = crate::SUPPORTED.map(Version::as_str).join(", ");
            Failure::new(code::INCOMPATIBLE_VERSION, "incompatible CNI version")
                .because(format!("cniVersion is {text:?}, this plugin speaks {supported}"))
        })
    }

    pub(crate) fn raw_version(&self) -> &str {
        &self.version
    }

    /// Fields every configuration must have.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.name.is_empty() {
            return Err(invalid("name", "is missing or empty"));
        }
        Ok(())
    }

    pub(crate) fn socket(&self) -> Result<PathBuf, Failure> {
        match &self.agent_socket {
            None => Ok(DEFAULT_SOCKET.into()),
            Some(path) if path.is_absolute() => Ok(path.clone()),
            Some(path) => Err(invalid("agentSocket", format!("{} is not an absolute path", path.display()))),
        }
    }
}

pub(crate) fn invalid(field: &str, reason: impl std::fmt::Display) -> Failure {
    Failure::new(code::INVALID_CONFIG, "invalid network configuration").because(format!("{field}: {reason}"))
}

fn bad(variable: &str, reason: impl std::fmt::Display) -> Failure {
    Failure::new(code::INVALID_ENVIRONMENT, format!("invalid environment variable {variable}")).because(reason)
}

impl Environment<'_> {
    fn required(&self, variable: &str) -> Result<String, Failure> {
        match (self.0)(variable) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(bad(variable, "is missing or empty")),
        }
    }

    pub(crate) fn command(&self) -> Result<String, Failure> {
        self.required("CNI_COMMAND")
    }

    /// `CNI_CONTAINERID` and `CNI_IFNAME`, in the form the specification demands.
    pub(crate) fn attachment(&self) -> Result<AttachmentId, Failure> {
        let container_id = self.required("CNI_CONTAINERID")?;
        let word = |c: char| c.is_ascii_alphanumeric();
        if !container_id.starts_with(word) || !container_id.chars().all(|c| word(c) || "_.-".contains(c)) {
            let rule = "must start with a letter or digit and hold only letters, digits, '_', '.' and '-'";
            return Err(bad("CNI_CONTAINERID", format!("{container_id:?} {rule}")));
        }
        let ifname = self.required("CNI_IFNAME")?;
        let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if ifname.len() > 15 || ifname == "." || ifname == ".." || ifname.contains(forbidden) {
            return Err(bad("CNI_IFNAME", format!("{ifname:?} is not a name of a network device")));
        }
        Ok(AttachmentId { container_id, ifname })
    }

    pub(crate) fn netns(&self) -> Result<PathBuf, Failure> {
        let path = PathBuf::from(self.required("CNI_NETNS")?);
        if !path.is_absolute() {
            return Err(bad("CNI_NETNS", format!("{} is not an absolute path", path.display())));
        }
        Ok(path)
    }

    /// The pod from `CNI_ARGS`.
    pub(crate) fn pod(&self) -> Result<PodName, Failure> {
        let text = self.required("CNI_ARGS")?;
        let mut arguments = BTreeMap::new();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(bad("CNI_ARGS", format!("{pair:?} is not of the form KEY=VALUE")));
            };
            arguments.insert(key.trim(), value);
        }
        let mut take = |key: &str| arguments.remove(key).filter(|value| !value.is_empty()).map(str::to_owned);
        let mut need = |key: &str| take(key).ok_or_else(|| bad("CNI_ARGS", format!("{key} is missing or empty")));
        let (namespace, name) = (need("K8S_POD_NAMESPACE")?, need("K8S_POD_NAME")?);
        let uid = take("K8S_POD_UID").unwrap_or_default();
        Ok(PodName { namespace, name, uid })
    }
}
