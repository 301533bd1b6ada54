//! The environment and the files a pod gives to its processes, as a value, so that they can be tested.
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Environment variables, and the root of the file system.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    variables: BTreeMap<String, String>,
    root: PathBuf,
}

impl Environment {
    /// This process's own. Variables that are not Unicode are left out.
    pub(crate) fn of_process() -> Environment {
        let unicode = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment { variables: std::env::vars_os().filter_map(unicode).collect(), root: "/".into() }
    }

    #[cfg(test)]
    pub(crate) fn new(root: &std::path::Path, variables: &[(&str, &str)]) -> Environment {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Environment { variables: variables.iter().map(own).collect(), root: root.to_owned() }
    }

    /// A variable that is set and not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The first of `names` that is set.
    pub(crate) fn first(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.get(name))
    }

    /// Variables that start with `prefix`, without it.
    pub(crate) fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.variables.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }

    /// Whether there is something at the absolute `path`.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.file(path).exists()
    }

    /// The absolute `path` below our root.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The file's text; `None` if there is none.
    ///
    /// # Errors
    /// If there is one that cannot be read.
    pub(crate) fn read(&self, path: &str) -> std::io::Result<Option<String>> {
        match std::fs::read_to_string(self.file(path)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            text => text.map(Some),
        }
    }
}

/// Where Kubernetes and Istio put what every pod of the mesh gets.
pub(crate) mod path {
    pub(crate) const TOKEN: &str = "/var/run/secrets/tokens/istio-token";
    pub(crate) const ROOTS: &str = "/var/run/secrets/istio/root-cert.pem";
    pub(crate) const REVOCATIONS: &str = "/var/run/secrets/istio/crl/ca-crl.pem";
    pub(crate) const KUBERNETES_ROOTS: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
    pub(crate) const LABELS: &str = "/etc/istio/pod/labels";
    pub(crate) const ANNOTATIONS: &str = "/etc/istio/pod/annotations";
}
