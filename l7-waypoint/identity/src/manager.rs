//! One fresh certificate per identity in use.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use parking_lot::{Mutex, RwLock};
use rand::Rng;
use serde::Serialize;
use strata_runtime::file;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use x509_parser::prelude::{FromDer, X509Certificate};
use xds_model::spiffe::SpiffeId;

use crate::ca::CaClient;
use crate::certificate::WorkloadCertificate;

/// At most so many requests at once (ztunnel).
const CONCURRENT_REQUESTS: usize = 8;
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(150);
/// A caller ends the pause after a failure, once it has lasted so long.
const PATIENCE: Duration = Duration::from_secs(1);
/// After new roots, certificates are asked for within this time, so that not every node asks at once.
const SPREAD: Duration = Duration::from_secs(2);
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
    /// Decimal.
    pub serial_number: String,
    /// RFC 3339.
    pub valid_from: String,
    pub expiration_time: String,
}

#[derive(Clone, Default)]
struct Slot {
    certificate: Option<Arc<WorkloadCertificate>>,
    /// Of the last attempt, if it failed, and when that began.
    error: Option<(Arc<str>, Instant)>,
}

struct Entry {
    slot: watch::Receiver<Slot>,
    /// Ends the pause before the next attempt.
    hurry: Arc<Notify>,
    task: AbortHandle,
}

struct Inner {
    ca: CaClient,
    /// Where renewals run: never a data-plane thread.
    runtime: Handle,
    permits: Semaphore,
    /// Counts changes of the root certificates.
    roots: watch::Sender<u64>,
    watchers: Mutex<Vec<AbortHandle>>,
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
        let (roots, _) = watch::channel(0);
        let (watchers, entries) = Default::default();
        let inner = Arc::new(Inner { ca, runtime, permits, roots, watchers, entries });
        let watchers = [follow_roots(&inner), follow_revocations(&inner)];
        *inner.watchers.lock() = watchers.into_iter().flatten().collect();
        IdentityManager { inner }
    }

    /// The certificate of `identity`, if one is at hand and valid. Never waits.
    pub fn cached(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        let entries = self.inner.entries.read();
        let certificate = entries.get(identity)?.slot.borrow().certificate.clone()?;
        certificate.is_valid(SystemTime::now()).then_some(certificate)
    }

    /// The certificate of `identity`; asks for the first one. What failed before counts for nothing: the CA may have
    /// come back, so an attempt is awaited that begins now, or a second after the last one failed.
    ///
    /// # Errors
    /// If that attempt fails and none is valid, or if 10 s pass.
    pub async fn certificate(&self, identity: &SpiffeId) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        if let Some(certificate) = self.cached(identity) {
            return Ok(certificate);
        }
        let (mut slot, hurry) = self.watch(identity);
        let wait = async {
            let asked = Instant::now();
            loop {
                {
                    let now = slot.borrow_and_update();
                    match (&now.certificate, &now.error) {
                        (Some(certificate), _) if certificate.is_valid(SystemTime::now()) => {
                            return Ok(certificate.clone());
                        }
                        (_, Some((_, began))) if *began < asked => hurry.notify_one(),
                        (_, Some((reason, _))) => {
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

    fn watch(&self, identity: &SpiffeId) -> (watch::Receiver<Slot>, Arc<Notify>) {
        let parts = |entry: &Entry| (entry.slot.clone(), entry.hurry.clone());
        if let Some(entry) = self.inner.entries.read().get(identity) {
            return parts(entry);
        }
        let mut entries = self.inner.entries.write();
        let entry = entries.entry(identity.clone()).or_insert_with(|| {
            let (sender, slot) = watch::channel(Slot::default());
            let hurry = Arc::new(Notify::new());
            let renewal = renew(Arc::downgrade(&self.inner), identity.clone(), sender, hurry.clone());
            Entry { slot, hurry, task: self.inner.runtime.spawn(renewal).abort_handle() }
        });
        parts(entry)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let entries = self.entries.get_mut().values().map(|entry| &entry.task);
        for task in entries.chain(self.watchers.get_mut().iter()) {
            task.abort();
        }
    }
}

/// Counts up when the file of root certificates changes: the CA may sign by another key now, and peers may soon trust
/// no other.
fn follow_roots(inner: &Arc<Inner>) -> Option<AbortHandle> {
    let path = inner.ca.roots_file()?.clone();
    let manager = Arc::downgrade(inner);
    let follow = async move {
        // The file as it is now is what the first certificates are made with.
        let mut seen = file::changed(&path, &[]).await;
        loop {
            seen = file::changed(&path, &seen).await;
            let Some(inner) = manager.upgrade() else { return };
            tracing::info!(path = %path.display(), "root certificates changed, asking for all certificates anew");
            inner.roots.send_modify(|changes| *changes += 1);
        }
    };
    Some(inner.runtime.spawn(follow).abort_handle())
}

/// Takes over the revocation lists now and whenever their file changes.
fn follow_revocations(inner: &Arc<Inner>) -> Option<AbortHandle> {
    let (path, revocations) = inner.ca.revocations();
    let (path, revocations) = (path?.clone(), revocations.clone());
    let take = {
        let path = path.clone();
        move |content: &[u8]| match revocations.replace(content) {
            Ok(lists) => tracing::info!(path = %path.display(), lists, "revocation lists in force"),
            Err(error) => {
                tracing::error!(path = %path.display(), error, "revocation lists not taken, the last good ones stay");
            }
        }
    };
    // Before the first handshake, if the file is there already.
    let mut seen = std::fs::read(&path).unwrap_or_default();
    if seen.is_empty() {
        tracing::info!(path = %path.display(), "no revocation lists yet");
    } else {
        take(&seen);
    }
    let follow = async move {
        loop {
            seen = file::changed(&path, &seen).await;
            take(&seen);
        }
    };
    Some(inner.runtime.spawn(follow).abort_handle())
}

async fn renew(manager: std::sync::Weak<Inner>, identity: SpiffeId, slot: watch::Sender<Slot>, hurry: Arc<Notify>) {
    let mut backoff = FIRST_BACKOFF;
    let Some(mut roots) = manager.upgrade().map(|inner| inner.roots.subscribe()) else { return };
    loop {
        let Some(inner) = manager.upgrade() else { return };
        roots.borrow_and_update();
        // The semaphore is never closed while `inner` lives.
        let Ok(permit) = inner.permits.acquire().await else { return };
        let began = Instant::now();
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
                let pause = backoff.mul_f64(rand::rng().random_range(1.0..2.0));
                tracing::warn!(%identity, %error, retry_ms = pause.as_millis() as u64, "no certificate");
                slot.send_modify(|slot| slot.error = Some((error.to_string().into(), began)));
                backoff = (backoff * 2).min(MAX_BACKOFF);
                pause
            }
        };
        let failed = slot.borrow().error.is_some();
        let hurried = async {
            let earliest = tokio::time::sleep(PATIENCE);
            hurry.notified().await;
            earliest.await;
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = hurried, if failed => {}
            // An error means that the manager is gone, which the next turn sees.
            _ = roots.changed() => {
                backoff = FIRST_BACKOFF;
                tokio::time::sleep(SPREAD.mul_f64(rand::random_range(0.0..1.0))).await;
            }
        }
    }
}

fn status(identity: &SpiffeId, slot: &Slot) -> CertificateStatus {
    let mut out = CertificateStatus {
        identity: identity.to_string(),
        state: if slot.error.is_some() { "Unavailable" } else { "Initializing" },
        cert_chain: Vec::new(),
        root_certs: Vec::new(),
        error: slot.error.as_ref().map(|(reason, _)| reason.clone()),
    };
    if let Some(certificate) = &slot.certificate {
        if certificate.is_valid(SystemTime::now()) {
            out.state = "Available";
        }
        out.cert_chain = certificate.chain().iter().map(|der| info(der)).collect();
        out.root_certs = certificate.roots().iter().map(|der| info(der)).collect();
    }
    out
}

fn info(der: &[u8]) -> CertificateInfo {
    let pem = base64::engine::general_purpose::STANDARD.encode(pem(der));
    let date = |at: OffsetDateTime| at.format(&Rfc3339).unwrap_or_default();
    let (serial_number, valid_from, expiration_time) = match X509Certificate::from_der(der) {
        Ok((_, parsed)) => {
            let validity = parsed.validity();
            let (from, to) = (validity.not_before.to_datetime(), validity.not_after.to_datetime());
            (parsed.tbs_certificate.serial.to_string(), date(from), date(to))
        }
        // It was verified, so it parses.
        Err(_) => Default::default(),
    };
    CertificateInfo { pem, serial_number, valid_from, expiration_time }
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
