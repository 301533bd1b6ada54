//! What really goes over the wire between the nodes.
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Lab;
use crate::error::Doing;
use crate::{LabError, Result, network, process, sys};

/// For tcpdump to listen.
const LISTENING: Duration = Duration::from_secs(5);

/// tcpdump at work.
#[derive(Debug)]
pub struct Capture {
    child: Option<Child>,
    file: PathBuf,
}

impl Lab {
    /// Captures the link between the nodes (at the first node's end), whole packets, until finished.
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    pub fn capture_link(&self) -> Result<Capture> {
        self.capture(&self.inner.nodes[0].name, network::UPLINK)
    }

    /// Captures a device in a namespace of this lab (a node's name, or as [`Lab::pod_netns`] ends).
    ///
    /// # Errors
    /// If tcpdump cannot be started.
    pub fn capture(&self, netns: &str, device: &str) -> Result<Capture> {
        let (file, log) = (self.root().join("capture.pcap"), self.root().join("tcpdump.log"));
        let cgroup = self.inner.paths.cgroup.join("tools");
        let command = process::command("tcpdump".as_ref(), &self.inner.paths.netns(netns), &cgroup)?;
        Capture::start(command, device, file, &log)
    }
}

impl Capture {
    /// Captures a device into `file` with `tcpdump`, the program run where its packets are seen. Returns once it listens.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut tcpdump: Command, device: &str, file: PathBuf, log: &Path) -> Result<Capture> {
        let errors = File::create(log).doing(log.display())?;
        tcpdump.args(["-i", device, "--immediate-mode", "-U", "-s", "0", "-n", "-Z", "root", "-w"]).arg(&file);
        let child = tcpdump.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().doing("tcpdump")?;
        let capture = Capture { child: Some(child), file };
        let until = Instant::now() + LISTENING;
        while !std::fs::read_to_string(log).is_ok_and(|text| text.contains("listening on")) {
            if Instant::now() > until {
                let (what, detail) = (format!("tcpdump on {device}"), format!(": {}", sys::tail(log, 3)));
                return Err(LabError::Timeout { what, seconds: LISTENING.as_secs(), detail });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(capture)
    }

    /// Ends the capture; the file, in pcap format. The next capture replaces it.
    ///
    /// # Errors
    /// If tcpdump cannot be waited for.
    pub fn stop(mut self) -> Result<PathBuf> {
        // The kernel hands packets over in batches.
        std::thread::sleep(Duration::from_millis(300));
        let mut child = self.child.take().ok_or_else(|| LabError::other("capture ended already"))?;
        if let Ok(pid) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        }
        child.wait().doing("tcpdump")?;
        Ok(std::mem::take(&mut self.file))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
