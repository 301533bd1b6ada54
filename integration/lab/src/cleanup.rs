//! Takes down whatever a lab made, also after a crash. Everything is found by name, nothing by memory.
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::error::Doing;
use crate::paths::{Paths, ROOT};
use crate::{LabError, Result};

/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// Says that a lab of this name is run by this process, until dropped or dead.
pub(crate) type Lock = Flock<File>;

/// Takes the lock of a lab.
///
/// # Errors
/// [`LabError::Taken`] if a living process has it.
pub(crate) fn lock(id: &str) -> Result<Lock> {
    fs::create_dir_all(ROOT).doing(ROOT)?;
    let path = Paths::lock_file(id);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).doing(path.display())?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| LabError::Taken(id.to_owned()))
}

/// Removes what labs left whose process is gone.
///
/// # Errors
/// The first thing that could not be removed.
pub fn sweep() -> Result<()> {
    let Ok(entries) = fs::read_dir(ROOT) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(id) = name.strip_suffix(".lock") else { continue };
        if let Ok(lock) = lock(id) {
            remove(id)?;
            let _ = fs::remove_file(Paths::lock_file(id));
            drop(lock);
        }
    }
    Ok(())
}

/// Waits until standard input ends, which is when the process that runs the lab is gone, then removes the lab.
///
/// # Errors
/// As [`remove`]; nothing is done if somebody else runs a lab of this name by then.
pub fn watch(id: &str) -> Result<()> {
    let mut rest = Vec::new();
    io::stdin().read_to_end(&mut rest).doing("standard input")?;
    // A dying process lets go of its pipes and its locks in no certain order.
    let until = Instant::now() + Duration::from_secs(2);
    let _lock = loop {
        match lock(id) {
            Ok(lock) => break lock,
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => return Ok(()),
        }
    };
    remove(id)?;
    fs::remove_file(Paths::lock_file(id)).or_else(missing_is_fine).doing("lock file")
}

/// Kills every process of a lab and removes its namespaces, pins, cgroups and run folder. Nothing there is no error.
///
/// # Errors
/// The first thing that could not be removed; the others are removed all the same.
pub fn remove(id: &str) -> Result<()> {
    let paths = Paths::new(id)?;
    let results = [
        kill_all(&paths.cgroup).doing(format!("processes in {}", paths.cgroup.display())),
        remove_tree(&paths.bpffs).doing(paths.bpffs.display()),
        remove_namespaces(&paths.netns_name("")).doing("network namespaces"),
        remove_cgroups(&paths.cgroup).doing(paths.cgroup.display()),
        remove_tree(&paths.root).doing(paths.root.display()),
    ];
    results.into_iter().collect()
}

/// Everything on this machine that carries the name of a lab: namespaces, pins, cgroups, run folder.
///
/// # Errors
/// If the name is none or cgroup v2 is not mounted.
pub fn traces(id: &str) -> Result<Vec<PathBuf>> {
    let paths = Paths::new(id)?;
    let namespaces = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let prefix = paths.netns_name("");
    let ours = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    let mut found: Vec<PathBuf> = namespaces.filter(ours).collect();
    found.extend([paths.root, paths.bpffs, paths.cgroup].into_iter().filter(|path| path.exists()));
    Ok(found)
}

fn missing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    fs::remove_dir_all(path).or_else(missing_is_fine)
}

/// Kills what is in a cgroup and below (cgroup.kill, Linux 5.14) and waits until it is empty.
fn kill_all(cgroup: &Path) -> io::Result<()> {
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    let until = Instant::now() + GONE;
    while fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default().contains("populated 1") {
        if Instant::now() > until {
            return Err(io::Error::other("processes do not die"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn remove_cgroups(cgroup: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) => return missing_is_fine(error),
        Ok(entries) => entries,
    };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroups(&entry.path())?;
    }
    // Emptied a moment ago: the kernel may still be letting go of the last process.
    let mut result = Ok(());
    for _ in 0..100 {
        result = fs::remove_dir(cgroup).or_else(missing_is_fine);
        if result.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    result
}

fn remove_namespaces(prefix: &str) -> io::Result<()> {
    let entries = match fs::read_dir("/run/netns") {
        Err(error) => return missing_is_fine(error),
        Ok(entries) => entries,
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            remove_namespace(&entry.path())?;
        }
    }
    Ok(())
}

/// The name of a network namespace goes; the namespace itself when its last process and socket are gone.
pub(crate) fn remove_namespace(path: &Path) -> io::Result<()> {
    // Not a mount point if its making was interrupted.
    let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
    fs::remove_file(path).or_else(missing_is_fine)
}
