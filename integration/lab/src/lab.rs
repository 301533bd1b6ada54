//! The lab: starts everything, keeps it running, and lets scenes act on it.
mod act;
mod ask;
mod capture;
mod start;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use compat_objects::source::{DirectorySource, Snapshot};
use parking_lot::{Mutex, RwLock};

use crate::endpoints::{self, Pods};
use crate::kubelet::Kubelet;
use crate::network::Node;
use crate::paths::{Description, Paths};
use crate::process::Supervised;
use crate::{Result, cleanup, sys};

pub use capture::Capture;

/// How often the lab's controllers look around.
const ROUND: Duration = Duration::from_millis(25);

/// What to build.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the mesh: lower-case letters and digits. Two meshes of different names run side by side.
    pub id: String,
    /// Folder of YAML.
    pub dir: PathBuf,
    /// Work on a copy of `dir`, so that scenes may edit it.
    pub copy: bool,
    /// Where the binaries are; default: where this program is.
    pub bin: Option<PathBuf>,
    /// Leave the run folder's logs in this folder when the lab ends.
    pub keep_logs: Option<PathBuf>,
}

impl Options {
    /// A mesh named `id` over a folder that is read where it is.
    pub fn new(id: impl Into<String>, dir: impl Into<PathBuf>) -> Options {
        Options { id: id.into(), dir: dir.into(), copy: false, bin: None, keep_logs: None }
    }
}

/// A running two-node mesh; gone, with everything it made, when dropped.
pub struct Lab {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
    watcher: Option<(Child, ChildStdin)>,
    keep_logs: Option<PathBuf>,
    _lock: cleanup::Lock,
}

/// What the controllers' threads share.
struct Inner {
    paths: Paths,
    bin: PathBuf,
    /// Where users (and scenes) edit.
    live: PathBuf,
    nodes: Vec<Node>,
    processes: Mutex<BTreeMap<String, Supervised>>,
    kubelets: Vec<Mutex<Kubelet>>,
    objects: RwLock<Arc<Snapshot>>,
    description: Description,
    stopping: AtomicBool,
}

impl Lab {
    /// Name of the mesh.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.paths.id
    }

    /// The folder whose YAML is in force and may be edited.
    #[must_use]
    pub fn live(&self) -> &Path {
        &self.inner.live
    }

    /// Run folder: logs, sockets, state.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.inner.paths.root
    }

    /// Where everything can be asked.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.inner.description
    }
}

impl Inner {
    fn sources(&self) -> Vec<PathBuf> {
        vec![self.live.clone(), self.paths.edits_dir()]
    }

    /// Keeps processes running and endpoints written, until stopped.
    fn tend(&self) {
        let mut source = DirectorySource::new(self.sources());
        let mut written = String::new();
        while !self.stopping.load(Ordering::Relaxed) {
            self.processes.lock().values_mut().for_each(Supervised::tend);
            let snapshot = source.load();
            let objects = snapshot.objects.clone();
            *self.objects.write() = snapshot;
            let pods = self.pods();
            let text = endpoints::render(&objects, &pods);
            if text != written {
                match sys::replace(&self.paths.status_dir().join("endpointslices.yaml"), &text) {
                    Ok(()) => written = text,
                    // Somebody takes the lab down under us.
                    Err(_) if !self.paths.status_dir().exists() => return,
                    Err(error) => eprintln!("lab: endpointslices.yaml: {error}"),
                }
            }
            std::thread::sleep(ROUND);
        }
    }

    /// One node's kubelet, until stopped.
    fn run_kubelet(&self, index: usize) {
        let mut told = String::new();
        while !self.stopping.load(Ordering::Relaxed) {
            let objects = self.objects.read().objects.clone();
            for error in self.kubelets[index].lock().reconcile(&objects) {
                let text = error.to_string();
                if text != told {
                    eprintln!("lab: {text}");
                    told = text;
                }
            }
            std::thread::sleep(ROUND);
        }
    }

    /// Pods that have an address. A kubelet that is busy with a CNI call is not waited for long.
    fn pods(&self) -> Pods {
        self.kubelets.iter().flat_map(|kubelet| kubelet.lock().statuses().collect::<Vec<_>>()).collect()
    }

    fn process_names(&self) -> Vec<String> {
        self.processes.lock().keys().cloned().collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panicked controller has said so; cleaning up matters more.
            let _ = thread.join();
        }
        if let Some(folder) = &self.keep_logs {
            let _ = copy_folder(&self.inner.paths.root.join("logs"), folder);
        }
        if let Err(error) = cleanup::remove(&self.inner.paths.id) {
            eprintln!("lab: cleaning up: {error}");
        }
        let _ = std::fs::remove_file(Paths::lock_file(&self.inner.paths.id));
        if let Some((mut child, stdin)) = self.watcher.take() {
            // Nothing is left for it; killed before its pipe ends, so that it cannot meet a successor of our name.
            let _ = child.kill();
            let _ = child.wait();
            drop(stdin);
        }
    }
}

/// Copies the files of a folder, without those in folders below.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    use crate::error::Doing;
    std::fs::create_dir_all(to).doing(to.display())?;
    for entry in std::fs::read_dir(from).doing(from.display())?.flatten() {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).doing(entry.path().display())?;
        }
    }
    Ok(())
}
