//! What the integration tests share: a lab of the shop for each test, one at a time.
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};
use strata_lab::{Lab, Options};

/// The repository's root.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Scenes measure: two at once on the same cores would measure each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A running shop for one test.
pub struct Shop {
    pub lab: Lab,
    _turn: MutexGuard<'static, ()>,
}

/// Starts the shop of `manifests/samples/shop` on a copy of its folder.
///
/// # Panics
/// If it cannot be started; the message says what is missing (root, a binary, a kernel feature).
#[must_use]
pub fn shop() -> Shop {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let turn = ONE_AT_A_TIME.lock();
    let id = format!("t{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let mut options = Options::new(id, repository().join("manifests/samples/shop"));
    options.copy = true;
    match Lab::start(options) {
        Ok(lab) => Shop { lab, _turn: turn },
        Err(error) => panic!("the lab cannot be started: {error}"),
    }
}

impl Shop {
    /// Writes everything's state for whoever looks into a failure, and says where.
    #[must_use]
    pub fn dump(&self, test: &str) -> String {
        let folder = repository().join("target/test-dumps").join(test);
        match self.lab.dump(&folder) {
            Ok(()) => format!("state of the mesh: {}", folder.display()),
            Err(error) => format!("the state of the mesh could not be dumped: {error}"),
        }
    }
}
