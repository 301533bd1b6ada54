//! Inbound connections that are open: a policy that now denies one closes it.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use parking_lot::Mutex;
use strata_runtime::drain;
use tokio::sync::watch;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::{Mesh, Workload};

use super::Shared;
use crate::telemetry::Failure;
use l7_authz::l4::{self, Connection, Decision, Reason};

/// What authorization asks of an inbound connection.
#[derive(Debug, Clone)]
pub(crate) struct Subject {
    pub destination_uid: Arc<str>,
    pub source_ip: IpAddr,
    pub identity: Option<SpiffeId>,
    pub destination: SocketAddr,
}

impl Subject {
    /// Decides by the view's policies; a workload the view does not know is refused.
    pub(crate) fn decide(&self, mesh: &Mesh) -> Decision {
        match mesh.workload(&self.destination_uid) {
            Some(workload) => self.decide_for(mesh, workload),
            None => Decision { allowed: false, policy: None, reason: Reason::NotAllowed },
        }
    }

    pub(crate) fn decide_for(&self, mesh: &Mesh, workload: &Workload) -> Decision {
        let connection =
            Connection { source_ip: self.source_ip, identity: self.identity.as_ref(), destination: self.destination };
        l4::evaluate(mesh, workload, &connection)
    }
}

/// A denial as metrics, logs and events say it.
pub(crate) fn denial(decision: &Decision, identity: Option<&SpiffeId>) -> Failure {
    let reason = match (decision.reason, identity) {
        (Reason::Denied, None) => "plaintext denied by policy",
        (reason, _) => reason.as_str(),
    };
    Failure::denied(decision.policy.clone(), reason)
}

struct Entry {
    subject: Subject,
    /// Says which decision cut the connection.
    cut: watch::Sender<Option<Decision>>,
}

/// The registry. Sharded by worker would be faster; a lock a connection is what it costs now.
#[derive(Default)]
pub(crate) struct Live {
    entries: Mutex<slab::Slab<Entry>>,
}

/// Keeps a connection registered.
pub(crate) struct Registered {
    shared: Arc<Shared>,
    key: usize,
    subject: Subject,
    cut: watch::Receiver<Option<Decision>>,
}

impl Registered {
    /// Registers an allowed connection and decides once more, so that a policy published in between is not missed.
    pub(crate) fn new(shared: &Arc<Shared>, subject: Subject) -> Result<Registered, Decision> {
        let (sender, cut) = watch::channel(None);
        let entry = Entry { subject: subject.clone(), cut: sender };
        let key = shared.live.entries.lock().insert(entry);
        let registered = Registered { shared: shared.clone(), key, subject, cut };
        let decision = registered.subject.decide(&shared.mesh.load());
        if decision.allowed { Ok(registered) } else { Err(decision) }
    }

    /// Resolves when policy no longer allows the connection, with what to say of it.
    pub(crate) async fn denied(&self) -> Failure {
        let mut cut = self.cut.clone();
        let failure = match cut.wait_for(Option::is_some).await.map(|decision| decision.clone()) {
            Ok(Some(decision)) => denial(&decision, self.subject.identity.as_ref()),
            // The sender lives in the registry as long as we do.
            _ => return std::future::pending().await,
        };
        Failure { error: format!("policy changed: {}", failure.error), ..failure }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.live.entries.lock().remove(self.key);
    }
}

impl Live {
    pub(crate) fn subjects(&self) -> Vec<Subject> {
        self.entries.lock().iter().map(|(_, entry)| entry.subject.clone()).collect()
    }

    fn reconsider(&self, mesh: &Mesh) {
        for (_, entry) in &*self.entries.lock() {
            let decision = entry.subject.decide(mesh);
            if !decision.allowed && entry.cut.borrow().is_none() {
                entry.cut.send_replace(Some(decision));
            }
        }
    }
}

/// Reconsiders all connections with each new view.
pub(crate) async fn follow(shared: Arc<Shared>, mut drain: drain::Watch) {
    let mut changes = shared.mesh.changes();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = drain.signaled() => return,
        }
        let mesh = shared.mesh.load_full();
        shared.live.reconsider(&mesh);
    }
}
