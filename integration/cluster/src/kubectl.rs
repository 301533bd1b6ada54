//! The cluster as a person sees it: through kubectl.
use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use strata_lab::{LabError, Result};

/// kubectl with the configuration of one cluster.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: String,
}

impl Default for Kubectl {
    fn default() -> Kubectl {
        Kubectl::new()
    }
}

impl Kubectl {
    /// `$KUBECTL`, else `kubectl`; the cluster is `$KUBECONFIG`'s.
    #[must_use]
    pub fn new() -> Kubectl {
        Kubectl { program: std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".into()) }
    }

    /// A command to add to and run.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args);
        command
    }

    /// Runs it; what it printed.
    ///
    /// # Errors
    /// If it fails; the error has its standard error.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        output(self.command(args), &format!("kubectl {}", args.join(" ")), None)
    }

    /// As [`Kubectl::run`], with arguments separated by blanks.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn words(&self, args: &str) -> Result<String> {
        self.run(&args.split_whitespace().collect::<Vec<_>>())
    }

    /// An object or a list, as JSON.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn get(&self, args: &str) -> Result<Value> {
        let text = self.words(&format!("get {args} -o json"))?;
        serde_json::from_str(&text).map_err(|error| LabError::Other(format!("kubectl get {args}: {error}")))
    }

    /// Server-side apply under a name of its own.
    ///
    /// # Errors
    /// If the API server refuses an object.
    pub fn apply(&self, manager: &str, yaml: &str) -> Result<String> {
        let args = ["apply", "--server-side", "--force-conflicts", "--field-manager", manager, "-f", "-"];
        output(self.command(args), &format!("kubectl {}", args.join(" ")), Some(yaml))
    }

    /// Runs a program in a pod; what it printed.
    ///
    /// # Errors
    /// If it fails.
    pub fn exec(&self, namespace: &str, pod: &str, program: &[&str]) -> Result<String> {
        self.run(&[&["exec", "-n", namespace, pod, "--"], program].concat())
    }

    /// Waits until `look` says so.
    ///
    /// # Errors
    /// [`LabError::Timeout`] with what was wrong at the last look.
    pub fn wait(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Kubectl) -> Result<bool>,
    ) -> Result<Duration> {
        let began = Instant::now();
        loop {
            let seen = look(self);
            if matches!(seen, Ok(true)) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                let detail = seen.err().map(|error| format!(": {error}")).unwrap_or_default();
                return Err(LabError::Timeout { what: what.to_owned(), seconds: limit.as_secs(), detail });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits for a rollout.
    ///
    /// # Errors
    /// If it is not complete in time.
    pub fn rolled_out(&self, namespace: &str, object: &str, limit: Duration) -> Result<String> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        self.run(&["rollout", "status", "-n", namespace, object, &timeout])
    }
}

/// Runs a command to its end.
///
/// # Errors
/// If it fails; the error has what it wrote.
pub fn output(mut command: Command, shown: &str, input: Option<&str>) -> Result<String> {
    let io = |source| LabError::Io { what: shown.to_owned(), source };
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().map_err(io)?;
    if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
        // kubectl that refuses its arguments does not read: its exit tells why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let done = child.wait_with_output().map_err(io)?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(LabError::Command { command: shown.to_owned(), output: format!("{text}{errors}") })
}
