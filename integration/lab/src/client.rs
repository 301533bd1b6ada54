//! What the client commands of strata-echo print, in types.
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::Doing;
use crate::{LabError, Result, sys};

/// `strata-echo call`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Call {
    pub sent: u64,
    /// Answered with 2xx.
    pub ok: u64,
    pub seconds: f64,
    pub status: BTreeMap<u16, u64>,
    pub servers: BTreeMap<String, u64>,
    pub versions: BTreeMap<String, u64>,
    pub errors: BTreeMap<String, u64>,
    pub latency_ms: Latency,
    pub connections: u64,
    pub peer: Option<String>,
    pub local: Option<String>,
    pub first_failures: Vec<Value>,
    pub last: Option<Value>,
    /// Milliseconds since 1970 at the start, status (0: error), version that answered, milliseconds it took.
    #[serde(default)]
    pub samples: Vec<(f64, u16, String, f64)>,
}

impl Call {
    /// Requests that got no 2xx.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.sent - self.ok
    }

    /// How often this version answered.
    #[must_use]
    pub fn version(&self, version: &str) -> u64 {
        self.versions.get(version).copied().unwrap_or(0)
    }

    /// How often this status came.
    #[must_use]
    pub fn with_status(&self, status: u16) -> u64 {
        self.status.get(&status).copied().unwrap_or(0)
    }

    /// A field of the last answer's JSON body; empty if there is none.
    #[must_use]
    pub fn body(&self, field: &str) -> String {
        let value = self.last.as_ref().map(|last| &last["body"][field]);
        value.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).unwrap_or_default()
    }

    /// In one line.
    #[must_use]
    pub fn brief(&self) -> String {
        let mut text = format!("{} of {} answered 2xx", self.ok, self.sent);
        if self.failed() > 0 {
            text += &format!(
                ", status {:?}, errors {:?}, first {:?}",
                self.status,
                self.errors,
                self.first_failures.first()
            );
        }
        text
    }
}

/// Milliseconds.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// `strata-echo connect`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Connect {
    pub ok: bool,
    pub error: Option<String>,
    pub took_ms: f64,
    pub peer: Option<String>,
    pub local: Option<String>,
    pub reply: Option<Value>,
}

impl Connect {
    /// A field of the answer; empty if there is none.
    #[must_use]
    pub fn replied(&self, field: &str) -> String {
        let value = self.reply.as_ref().and_then(|reply| reply.get(field)).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    }
}

/// A client command under way in a pod; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    command: String,
    log: PathBuf,
    /// What asks it to end, if a signal to the child does not.
    stop: Option<Command>,
}

impl Running {
    /// Starts `command`, which prints one JSON document in the end; its standard error goes to the file `log`.
    /// `shown` is what errors call it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command, shown: String, log: PathBuf) -> Result<Running> {
        let errors = File::create(&log).doing(log.display())?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors).spawn().doing(&shown)?;
        Ok(Running { child: Some(child), command: shown, log, stop: None })
    }

    /// The command that asks it to end: for a child that only watches something elsewhere.
    #[must_use]
    pub fn stopped_by(mut self, command: Command) -> Running {
        self.stop = Some(command);
        self
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Asks it to end (SIGTERM) and reads its report.
    ///
    /// # Errors
    /// As [`Running::report`].
    pub fn finish<T: DeserializeOwned>(mut self) -> Result<T> {
        if let Some(mut stop) = self.stop.take() {
            stop.status().doing("asking it to end")?;
        } else if let Ok(pid) = i32::try_from(self.pid()) {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        self.report()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until standard error holds `text`.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_for_log(&self, text: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        while !self.log().contains(text) {
            if Instant::now() > until {
                let detail = format!(": {}", sys::tail(&self.log, 3));
                return Err(LabError::Timeout {
                    what: format!("{text:?} of {}", self.command),
                    seconds: limit.as_secs(),
                    detail,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits for its end and reads its report.
    ///
    /// # Errors
    /// If it failed or printed something else than the JSON wanted.
    pub fn report<T: DeserializeOwned>(mut self) -> Result<T> {
        let child = self.child.take().ok_or_else(|| LabError::other("already reported"))?;
        let output = child.wait_with_output().doing(&self.command)?;
        parse(&self.command, &output.stdout, &self.log())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

pub(crate) fn parse<T: DeserializeOwned>(command: &str, stdout: &[u8], stderr: &str) -> Result<T> {
    serde_json::from_slice(stdout).map_err(|error| LabError::Command {
        command: command.to_owned(),
        output: format!("{error}: {} {}", String::from_utf8_lossy(stdout).trim(), stderr.trim()),
    })
}
