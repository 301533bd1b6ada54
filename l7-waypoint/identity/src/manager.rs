//! One fresh certificate per identity in use.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use parking_lot::RwLock;
use rand::Rng;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use xds_model::spiffe::SpiffeId;

use crate::ca::CaClient;
use crate::certificate::WorkloadCertificate;

/// At most so many requests at once (ztunnel).
const CONCURRENT_REQUESTS: usize = 8;
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(150);
/// A caller waits no longer than this for a first certificate.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IdentityError {
    #[error("no certificate for {identity}: {reason}")]
    Unavailable { identity: SpiffeId, reason: Arc<str> },
    #[error("no certificate for {identity} after 10 s")]
    Timeout { identity: SpiffeId },
}

/// What the admin interface shows of one identity, in the shape istioctl reads.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    pub identity: String,
    pub state: &'static str,
    pub cert_chain: Vec<CertificateInfo>,
    pub root_certs: Vec<CertificateInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Arc<str>>,
}

/// One certificate of a chain.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateInfo {
    /// Base64 of the PEM text.
    pub pem: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// Seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_from: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expiration_time: Option<u64>,
}

#[derive(Clone, Default)]
struct Slot {
    certificate: Option<Arc<WorkloadCertificate>>,
    /// Of the last attempt, if it failed.
    error: Option<Arc<str>>,
}

struct Entry {
    slot: watch::Receiver<Slot>,
    task: AbortHandle,
}

struct Inner {
    ca: CaClient,
    /// Where renewals run: never a data-plane thread.
    runtime: Handle,
    permits: Semaphore,
    entries: RwLock<HashMap<SpiffeId, Entry>>,
}

/// Fetches on demand, renews at half of the lifetime, keeps an old certificate while it is valid.
#[derive(Clone)]
pub struct IdentityManager {
    inner: Arc<Inner>,
}

impl IdentityManager {
    /// `runtime` runs the requests.
    pub fn new(ca: CaClient, runtime: Handle) -> IdentityManager {
        let permits = Semaphore::new(CONCURRENT_REQUESTS);
        IdentityManager { inner: Arc::new(Inner { ca, runtime, permits, entries: RwLock::new(HashMap::new()) }) }
    }

    /// The certificate of `identity`, if one is at hand and valid. Never waits.
    pub fn cached(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        let entries = self.inner.entries.read();
        let certificate = entries.get(identity)?.slot.borrow().certificate.clone()?;
        certificate.is_valid(SystemTime::now()).then_some(certificate)
    }

    /// The certificate of `identity`; asks for the first one.
    ///
    /// # Errors
    /// If the last attempt failed and none is valid, or if 10 s pass.
    pub async fn certificate(&self, identity: &SpiffeId) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        if let Some(certificate) = self.cached(identity) {
            return Ok(certificate);
        }
        let mut slot = self.watch(identity);
        let wait = async {
            loop {
                {
                    let now = slot.borrow_and_update();
                    match (&now.certificate, &now.error) {
                        (Some(certificate), _) if certificate.is_valid(SystemTime::now()) => {
                            return Ok(certificate.clone());
                        }
                        (_, Some(reason)) => {
                            return Err(IdentityError::Unavailable {
                                identity: identity.clone(),
                                reason: reason.clone(),
                            });
                        }
                        _ => {}
                    }
                }
                if slot.changed().await.is_err() {
                    let reason = "the identity is no longer in use".into();
                    return Err(IdentityError::Unavailable { identity: identity.clone(), reason });
                }
            }
        };
        match tokio::time::timeout(MAX_WAIT, wait).await {
            Ok(outcome) => outcome,
            Err(_) => Err(IdentityError::Timeout { identity: identity.clone() }),
        }
    }

    /// Starts fetching without waiting: for identities that will be needed.
    pub fn prefetch(&self, identity: &SpiffeId) {
        drop(self.watch(identity));
    }

    /// Stops renewing an identity that is no longer in use and drops its key.
    pub fn forget(&self, identity: &SpiffeId) {
        if let Some(entry) = self.inner.entries.write().remove(identity) {
            entry.task.abort();
        }
    }

    /// All identities and their certificates.
    pub fn status(&self) -> Vec<CertificateStatus> {
        let entries = self.inner.entries.read();
        let mut list: Vec<_> = entries.iter().map(|(identity, entry)| status(identity, &entry.slot.borrow())).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    fn watch(&self, identity: &SpiffeId) -> watch::Receiver<Slot> {
        if let Some(entry) = self.inner.entries.read().get(identity) {
            return entry.slot.clone();
        }
        let mut entries = self.inner.entries.write();
        let entry = entries.entry(identity.clone()).or_insert_with(|| {
            let (sender, slot) = watch::channel(Slot::default());
            let renewal = renew(Arc::downgrade(&self.inner), identity.clone(), sender);
            Entry { slot, task: self.inner.runtime.spawn(renewal).abort_handle() }
        });
        entry.slot.clone()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for entry in self.entries.get_mut().values() {
            entry.task.abort();
        }
    }
}

async fn renew(manager: std::sync::Weak<Inner>, identity: SpiffeId, slot: watch::Sender<Slot>) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let Some(inner) = manager.upgrade() else { return };
        // The semaphore is never closed while `inner` lives.
        let Ok(permit) = inner.permits.acquire().await else { return };
        let outcome = inner.ca.issue(&identity).await;
        drop(permit);
        drop(inner);
        let pause = match outcome {
            Ok(certificate) => {
                tracing::info!(%identity, serial = certificate.serial(), "certificate issued");
                backoff = FIRST_BACKOFF;
                let refresh = certificate.refresh_at().duration_since(SystemTime::now()).unwrap_or_default();
                slot.send_replace(Slot { certificate: Some(Arc::new(certificate)), error: None });
                refresh.max(Duration::from_secs(1))
            }
            Err(error) => {
                tracing::warn!(%identity, %error, "no certificate");
                slot.send_modify(|slot| slot.error = Some(error.to_string().into()));
                let pause = backoff.mul_f64(rand::rng().random_range(1.0..2.0));
                backoff = (backoff * 2).min(MAX_BACKOFF);
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn status(identity: &SpiffeId, slot: &Slot) -> CertificateStatus {
    let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let info = |der: &[u8]| CertificateInfo {
        pem: base64::engine::general_purpose::STANDARD.encode(pem(der)),
        serial_number: None,
        valid_from: None,
        expiration_time: None,
    };
    let mut out = CertificateStatus {
        identity: identity.to_string(),
        state: if slot.error.is_some() { "Unavailable" } else { "Initializing" },
        cert_chain: Vec::new(),
        root_certs: Vec::new(),
        error: slot.error.clone(),
    };
    if let Some(certificate) = &slot.certificate {
        if certificate.is_valid(SystemTime::now()) {
            out.state = "Available";
        }
        out.cert_chain = certificate.chain().iter().map(|der| info(der)).collect();
        out.root_certs = certificate.roots().iter().map(|der| info(der)).collect();
        if let Some(leaf) = out.cert_chain.first_mut() {
            leaf.serial_number = Some(certificate.serial().to_owned());
            leaf.valid_from = Some(seconds(certificate.not_before()));
            leaf.expiration_time = Some(seconds(certificate.not_after()));
        }
    }
    out
}

/// RFC 7468 text of one certificate.
fn pem(der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}
