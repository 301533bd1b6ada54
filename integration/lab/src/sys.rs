//! Namespaces, cgroups and commands.
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns};

use crate::error::Doing;
use crate::{LabError, Result};

/// Oldest kernel whose programs and links are enough.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Whether this machine and user can run a lab.
///
/// # Errors
/// [`LabError::Machine`] with what is missing and how to get it.
pub fn check_privileges() -> Result<()> {
    let machine = |text: String| Err(LabError::Machine(text));
    if !nix::unistd::geteuid().is_root() {
        return machine("root is needed (network namespaces, eBPF): run it with sudo".into());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").doing("kernel version")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST_KERNEL {
        return machine(format!("Linux {} is too old, 5.15 or later is needed", release.trim()));
    }
    cgroup_root()?;
    if fs::metadata("/sys/fs/bpf").is_err() {
        return machine("/sys/fs/bpf is missing: the kernel is built without eBPF".into());
    }
    ensure_bpffs()?;
    for tool in ["ip", "tcpdump", "mount"] {
        if find_tool(tool).is_none() {
            return machine(format!("the program {tool} is not installed (`make setup` installs what is needed)"));
        }
    }
    Ok(())
}

fn ensure_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").doing("/proc/self/mountinfo")?;
    if mounts.lines().any(|line| line.split(' ').nth(4) == Some("/sys/fs/bpf")) {
        return Ok(());
    }
    run("mount", &["-t", "bpf", "bpf", "/sys/fs/bpf"]).map(|_| ())
}

fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/bin".into()]);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Where cgroup v2 is mounted (proc_pid_mountinfo(5)).
pub(crate) fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").doing("/proc/self/mountinfo")?;
    let found = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4).map(PathBuf::from))?
    });
    found.ok_or_else(|| {
        LabError::Machine("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified".into())
    })
}

/// Runs a program and gives its standard output.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String> {
    let tool = find_tool(program).unwrap_or_else(|| program.into());
    let output = Command::new(tool).args(args).output().doing(program)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(LabError::Command {
        command: format!("{program} {}", args.join(" ")),
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// `ip` with its arguments in one string.
pub(crate) fn ip(args: &str) -> Result<String> {
    run("ip", &args.split_whitespace().collect::<Vec<_>>())
}

/// Runs `work` on a thread inside a network namespace.
pub(crate) fn in_netns<T: Send>(netns: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let file = File::open(netns)?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            work()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("work in the namespace panicked")))
    })
}

/// Writes whole or not at all.
pub(crate) fn replace(path: &Path, content: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    fs::write(&partial, content)?;
    fs::rename(&partial, path)
}

/// Bytes of a file, text; empty if it cannot be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
