//! What the privileged tests share: a private bpffs folder and cgroup subtree, and the datapath loaded on them.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]

pub mod helper;
pub mod net;

use std::path::{Path, PathBuf};

use l4_loader::{Datapath, Features, LoadOptions};

/// Where cgroup v2 is mounted.
pub fn cgroup_root() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup v2 is mounted");
    line.split(' ').nth(4).expect("a mount point").into()
}

/// A node's folders; removed when dropped, and before use if an earlier run crashed.
pub struct Node {
    pub bpffs: PathBuf,
    pub cgroup: PathBuf,
    pub proxy_cgroup: PathBuf,
}

impl Node {
    pub fn new(name: &str) -> Node {
        assert!(nix::unistd::geteuid().is_root(), "this test loads eBPF programs and makes namespaces: run it as root");
        l4_loader::ensure_bpffs().expect("mount /sys/fs/bpf");
        let node = Node {
            bpffs: Path::new("/sys/fs/bpf").join(format!("strata-test-{name}")),
            cgroup: cgroup_root().join(format!("strata-test-{name}")),
            proxy_cgroup: cgroup_root().join(format!("strata-test-{name}/proxy")),
        };
        node.clean();
        std::fs::create_dir_all(&node.proxy_cgroup).expect("make the cgroups");
        std::fs::create_dir_all(node.cgroup.join("pods")).expect("make the cgroups");
        node
    }

    pub fn load(&self, features: Option<Features>) -> Datapath {
        let options = LoadOptions { bpffs: self.bpffs.clone(), cgroup: self.cgroup.clone(), features };
        Datapath::load(&options).unwrap_or_else(|error| panic!("{error}"))
    }

    fn clean(&self) {
        l4_loader::unload(&self.bpffs).expect("remove the pins");
        for folder in [self.cgroup.join("proxy"), self.cgroup.join("pods"), self.cgroup.clone()] {
            if folder.exists() {
                let processes = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
                for pid in processes.lines().filter_map(|line| line.parse().ok()) {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                }
                for _ in 0..100 {
                    if std::fs::remove_dir(&folder).is_ok() {
                        break;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.clean();
    }
}
