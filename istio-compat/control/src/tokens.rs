//! Bearer tokens of the clients: one file for every Node and every ServiceAccount.
//!
//! A token is random, valid as long as its Node or ServiceAccount exists, and the same after a restart.
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use compat_objects::{HasMeta, ObjectSet};
use parking_lot::RwLock;
use rand::RngCore;

/// Who a token stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// A node's proxy.
    Node(String),
    ServiceAccount {
        namespace: String,
        name: String,
    },
}

/// All tokens in force.
#[derive(Debug)]
pub struct Tokens {
    folder: PathBuf,
    by_token: RwLock<HashMap<String, Holder>>,
}

impl Tokens {
    /// Tokens kept in `folder`; none is in force yet.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, by_token: RwLock::default() }
    }

    /// Who presented this token.
    pub fn holder(&self, token: &str) -> Option<Holder> {
        self.by_token.read().get(token).cloned()
    }

    /// Puts tokens in force for exactly the Nodes and ServiceAccounts among the objects, making missing files.
    ///
    /// # Errors
    /// If a file cannot be read or written; the tokens in force stay as they were.
    pub fn update(&self, objects: &ObjectSet) -> io::Result<()> {
        let wanted = holders(objects);
        if wanted.iter().eq(self.by_token.read().values().collect::<BTreeSet<_>>()) {
            return Ok(());
        }
        let mut tokens = HashMap::new();
        for holder in wanted {
            let path = self.path(&holder);
            let token = match fs::read_to_string(&path) {
                Ok(token) if token.trim().len() >= 32 => token.trim().to_owned(),
                Ok(_) => create(&path)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => create(&path)?,
                Err(error) => return Err(error),
            };
            tokens.insert(token, holder);
        }
        *self.by_token.write() = tokens;
        Ok(())
    }

    /// Where a holder's token is.
    pub fn path(&self, holder: &Holder) -> PathBuf {
        match holder {
            Holder::Node(name) => self.folder.join("node").join(name),
            Holder::ServiceAccount { namespace, name } => self.folder.join("sa").join(namespace).join(name),
        }
    }
}

/// Nodes, ServiceAccounts, and the accounts pods use without anyone having written them down.
fn holders(objects: &ObjectSet) -> BTreeSet<Holder> {
    let account =
        |namespace: &str, name: &str| Holder::ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() };
    let nodes = objects.nodes().map(|node| Holder::Node(node.name().to_owned()));
    let accounts = objects.service_accounts().map(|sa| account(sa.namespace(), sa.name()));
    let used = objects.pods().filter_map(|pod| {
        let spec = pod.spec.as_ref()?;
        Some(account(pod.namespace(), spec.service_account_name.as_deref().unwrap_or("default")))
    });
    // A pod's node exists even if its Node object is not in the sources.
    let pod_nodes = objects.pods().filter_map(|pod| Some(Holder::Node(pod.spec.as_ref()?.node_name.clone()?)));
    nodes.chain(accounts).chain(used).chain(pod_nodes).filter(is_file_name).collect()
}

/// Names become paths: only what Kubernetes allows as a name may.
fn is_file_name(holder: &Holder) -> bool {
    let safe = |name: &String| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
    };
    match holder {
        Holder::Node(name) => safe(name),
        Holder::ServiceAccount { namespace, name } => safe(namespace) && safe(name),
    }
}

fn create(path: &Path) -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    rand::rng().fill_bytes(&mut bytes);
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    write_private(path, token.as_bytes())?;
    Ok(token)
}

/// Writes a file only its owner can read, whole or not at all, and makes its folders.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let temporary = path.with_extension("tmp");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use compat_objects::Object;
    use compat_objects::core::{Node, ObjectMeta, Pod, PodSpec};
    use std::os::unix::fs::PermissionsExt;

    fn meta(namespace: &str, name: &str) -> ObjectMeta {
        ObjectMeta { namespace: Some(namespace.into()), name: Some(name.into()), ..ObjectMeta::default() }
    }

    fn objects() -> ObjectSet {
        let node = Node { metadata: ObjectMeta { name: Some("a".into()), ..ObjectMeta::default() }, ..Node::default() };
        let pod = Pod { metadata: meta("shop", "p"), spec: Some(PodSpec::default()), ..Pod::default() };
        [Object::from(node), Object::from(pod)].into_iter().collect()
    }

    #[test]
    fn tokens_are_private_and_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let node = Holder::Node("a".into());
        let first = Tokens::new(folder.path().to_owned());
        first.update(&objects()).unwrap();
        let token = fs::read_to_string(first.path(&node)).unwrap();
        assert_eq!(fs::metadata(first.path(&node)).unwrap().permissions().mode() & 0o777, 0o600);
        let second = Tokens::new(folder.path().to_owned());
        second.update(&objects()).unwrap();
        assert_eq!(second.holder(&token), Some(node));
        let default = Holder::ServiceAccount { namespace: "shop".into(), name: "default".into() };
        assert!(second.path(&default).exists());
        second.update(&ObjectSet::default()).unwrap();
        assert_eq!(second.holder(&token), None);
    }

    #[test]
    fn a_name_cannot_leave_the_folder() {
        assert!(!is_file_name(&Holder::Node("../../etc/x".into())));
        assert!(!is_file_name(&Holder::Node("..".into())));
        assert!(is_file_name(&Holder::Node("node-a.example".into())));
    }
}
