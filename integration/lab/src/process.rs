//! Processes in a namespace and a cgroup.
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;
use crate::error::Doing;

/// How to start a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    /// Output is appended here.
    pub log: PathBuf,
}

/// A command that will run inside a namespace and a cgroup, in a process group of its own (a Ctrl-C is for us).
///
/// # Errors
/// If the namespace or the cgroup cannot be opened.
pub(crate) fn command(program: &Path, netns: &Path, cgroup: &Path) -> Result<Command> {
    fs::create_dir_all(cgroup).doing(cgroup.display())?;
    let netns = File::open(netns).doing(netns.display())?;
    let procs = cgroup.join("cgroup.procs");
    let procs = OpenOptions::new().write(true).open(&procs).doing(procs.display())?;
    let mut command = Command::new(program);
    command.process_group(0);
    let enter = move || {
        // "0" is the writing process (cgroups(7)).
        // SAFETY: write(2) with a buffer that lives and its length; async-signal-safe.
        if unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) } != 1 {
            return Err(io::Error::last_os_error());
        }
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: `enter` makes two system calls and allocates nothing, as the time between fork and exec demands.
    unsafe { command.pre_exec(enter) };
    Ok(command)
}

impl Spec {
    /// # Errors
    /// If the program cannot be started.
    pub(crate) fn start(&self) -> Result<Child> {
        if let Some(folder) = self.log.parent() {
            fs::create_dir_all(folder).doing(folder.display())?;
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log).doing(self.log.display())?;
        let mut command = command(&self.program, &self.netns, &self.cgroup)?;
        command.args(&self.args).envs(self.env.iter().cloned()).stdin(Stdio::null());
        command.stdout(log.try_clone().doing("log")?).stderr(log);
        command.spawn().doing(self.program.display())
    }
}

/// A process that is started again when it ends.
#[derive(Debug)]
pub(crate) struct Supervised {
    pub spec: Spec,
    child: Option<Child>,
    /// Nobody wants it to run.
    held: bool,
    next_start: Instant,
    pub restarts: u32,
}

/// Before a process that ended is started again.
const BACKOFF: Duration = Duration::from_millis(500);

impl Supervised {
    pub(crate) fn start(spec: Spec) -> Result<Supervised> {
        let child = Some(spec.start()?);
        Ok(Supervised { spec, child, held: false, next_start: Instant::now(), restarts: 0 })
    }

    /// Starts it again if it ended and should run. Call often.
    pub(crate) fn tend(&mut self) {
        let ended = match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        };
        if !ended {
            return;
        }
        if self.child.take().is_some() {
            self.next_start = Instant::now() + BACKOFF * 2_u32.pow(self.restarts.min(4));
        }
        if !self.held && Instant::now() >= self.next_start {
            self.restarts += 1;
            self.child = self.spec.start().ok();
        }
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok()) {
            // Gone already is as good.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Ends it and keeps it from being started; returns when it is gone.
    pub(crate) fn stop(&mut self, signal: Signal) {
        self.held = true;
        self.signal(signal);
        if let Some(mut child) = self.child.take() {
            let until = Instant::now() + Duration::from_secs(10);
            while matches!(child.try_wait(), Ok(None)) {
                if Instant::now() > until {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Lets it run (again), at once.
    pub(crate) fn release(&mut self) -> Result<()> {
        self.held = false;
        self.restarts = 0;
        if self.child.is_none() {
            self.child = Some(self.spec.start()?);
        }
        Ok(())
    }
}
