//! What scenes do to a mesh.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

use super::Lab;
use crate::client::{self, Call, Connect, Running};
use crate::error::Doing;
use crate::{LabError, Result, process, sys};

/// How long a single command in a pod may take before the lab thinks something is very wrong.
const POLL: Duration = Duration::from_millis(10);

impl Lab {
    /// Runs a command inside a pod (`NAMESPACE/NAME`): its network namespace and its cgroup.
    ///
    /// # Errors
    /// If there is no such pod or the program cannot be started; a failing program is no error.
    pub fn exec_in_pod(&self, pod: &str, command: &[&str]) -> Result<Output> {
        let (program, args) = command.split_first().ok_or_else(|| LabError::other("no command"))?;
        let (netns, cgroup) = self.pod_place(pod)?;
        let program = self.program(program);
        let mut command = process::command(&program, &netns, &cgroup)?;
        command.args(args).stdin(Stdio::null()).output().doing(program.display())
    }

    /// Runs `strata-echo` with these arguments inside a pod and reads the JSON it prints.
    ///
    /// # Errors
    /// As [`Lab::exec_in_pod`], or if it prints something else.
    pub fn client<T: DeserializeOwned>(&self, pod: &str, args: &[&str]) -> Result<T> {
        let mut command = vec!["strata-echo"];
        command.extend(args);
        let output = self.exec_in_pod(pod, &command)?;
        let shown = format!("{pod}: strata-echo {}", args.join(" "));
        client::parse(&shown, &output.stdout, &String::from_utf8_lossy(&output.stderr))
    }

    /// `strata-echo call ARGS` inside a pod.
    ///
    /// # Errors
    /// As [`Lab::client`].
    pub fn call(&self, pod: &str, args: &[&str]) -> Result<Call> {
        self.client(pod, &[&["call"], args].concat())
    }

    /// `strata-echo connect ARGS` inside a pod.
    ///
    /// # Errors
    /// As [`Lab::client`].
    pub fn connect(&self, pod: &str, args: &[&str]) -> Result<Connect> {
        self.client(pod, &[&["connect"], args].concat())
    }

    /// Starts `strata-echo ARGS` inside a pod and returns at once.
    ///
    /// # Errors
    /// As [`Lab::exec_in_pod`].
    pub fn spawn(&self, pod: &str, args: &[&str]) -> Result<Running> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let (netns, cgroup) = self.pod_place(pod)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = self.root().join(format!("client-{number}.log"));
        let mut command = process::command(&self.program("strata-echo"), &netns, &cgroup)?;
        command.args(args);
        Running::start(command, format!("{pod}: strata-echo {}", args.join(" ")), log)
    }

    /// A token of the issuer: the arguments of `strata-echo token` without `--keys`.
    ///
    /// # Errors
    /// If it cannot be minted.
    pub fn token(&self, args: &[&str]) -> Result<String> {
        let keys = self.root().join("issuer").display().to_string();
        let program = self.program("strata-echo").display().to_string();
        let text = sys::run(&program, &[&["token", "--keys", &keys], args].concat())?;
        Ok(text.trim().to_owned())
    }

    /// One of our programs by its name, any other by its path.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        let ours = self.inner.bin.join(name);
        if name.starts_with("strata") && ours.is_file() { ours } else { name.into() }
    }

    /// Writes a file of objects that overlays the user's folder (same object: merged field by field); as saving a
    /// file in an editor does, in one step. Another call with the same name replaces it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn edit(&self, name: &str, yaml: &str) -> Result<()> {
        sys::replace(&self.inner.paths.edits_dir().join(name), yaml).doing(name)
    }

    /// [`Lab::edit`] with the content of a file, under its own name.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn apply(&self, file: &Path) -> Result<()> {
        let text = fs::read_to_string(file).doing(file.display())?;
        self.edit(&file.file_name().unwrap_or_default().to_string_lossy(), &text)
    }

    /// Takes an edit back; none of that name is no error.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove_edit(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.inner.paths.edits_dir().join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).doing(name),
            _ => Ok(()),
        }
    }

    /// Takes every edit back.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn reset(&self) -> Result<()> {
        let folder = self.inner.paths.edits_dir();
        for entry in fs::read_dir(&folder).doing(folder.display())?.flatten() {
            fs::remove_file(entry.path()).doing(entry.path().display())?;
        }
        Ok(())
    }

    /// Waits until something holds; how long it took.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_until(&self, what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Result<Duration> {
        let began = Instant::now();
        while !holds() {
            if began.elapsed() > limit {
                let (what, seconds) = (what.to_owned(), limit.as_secs());
                return Err(LabError::Timeout { what, seconds, detail: String::new() });
            }
            std::thread::sleep(POLL);
        }
        Ok(began.elapsed())
    }

    /// Names for [`Lab::kill9`] and its kin: `control`, `agent-NODE`, `proxy-NODE`, `world-...`.
    #[must_use]
    pub fn processes(&self) -> Vec<String> {
        self.inner.process_names()
    }

    /// `kill -9`; the process stays away until [`Lab::release`].
    ///
    /// # Errors
    /// If there is no such process.
    pub fn kill9(&self, process: &str) -> Result<()> {
        self.end(process, Signal::SIGKILL)
    }

    /// SIGTERM; returns when the process is gone, and it stays away until [`Lab::release`].
    ///
    /// # Errors
    /// If there is no such process.
    pub fn terminate(&self, process: &str) -> Result<()> {
        self.end(process, Signal::SIGTERM)
    }

    fn end(&self, process: &str, signal: Signal) -> Result<()> {
        let mut processes = self.inner.processes.lock();
        processes.get_mut(process).ok_or_else(|| unknown(process))?.stop(signal);
        Ok(())
    }

    /// Starts a process that was ended.
    ///
    /// # Errors
    /// If there is no such process or it cannot be started.
    pub fn release(&self, process: &str) -> Result<()> {
        let mut processes = self.inner.processes.lock();
        processes.get_mut(process).ok_or_else(|| unknown(process))?.release()
    }

    /// Replaces a process as a rolling upgrade does: the new one starts and is ready before the old one is told to
    /// end and drain.
    ///
    /// # Errors
    /// If there is no such process, or the new one does not start.
    pub fn upgrade(&self, process: &str, ready: Duration) -> Result<()> {
        let spec = self.inner.processes.lock().get(process).ok_or_else(|| unknown(process))?.spec.clone();
        let fresh = process::Supervised::start(spec)?;
        let pid = fresh.pid();
        // Both write to the same admin socket path: the newer one has it once it listens. The old one goes when the new one
        // is Ready, as in a rollout.
        let is_new =
            || self.status_pid(process) == pid.map(u64::from) && self.admin_text(process, "/healthz/ready").is_ok();
        let waited = self.wait_until(&format!("the new {process}"), ready, is_new);
        let old = self.inner.processes.lock().insert(process.to_owned(), fresh);
        if let Some(mut old) = old {
            old.stop(Signal::SIGTERM);
        }
        waited.map(|_| ())
    }

    /// Kills a pod's processes; the kubelet starts them again.
    ///
    /// # Errors
    /// If there is no such pod.
    pub fn kill_pod(&self, pod: &str) -> Result<()> {
        self.with_pod(pod, |pod| pod.kill(Signal::SIGKILL))
    }

    /// Process id of a process that runs.
    #[must_use]
    pub fn pid(&self, process: &str) -> Option<u32> {
        self.inner.processes.lock().get(process)?.pid()
    }

    fn pod_place(&self, pod: &str) -> Result<(PathBuf, PathBuf)> {
        self.with_pod(pod, |pod| (pod.netns.clone(), pod.cgroup.clone()))
    }
}

fn unknown(process: &str) -> LabError {
    LabError::Other(format!("no process {process}"))
}
