//! Which service accounts are sent private keys: those that may read the Secrets of their namespace anyway (istiod's rule).
//! Nobody is before somebody has said so.
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use compat_kubernetes::AccessReviewer;
use parking_lot::Mutex;
use strata_runtime::drain;
use tokio::sync::Notify;

use crate::state::State;

/// When the API server is asked again whether a right is still there, and whether one has come that was missing.
const AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(10));

/// Namespace and name.
pub(crate) type Account = (String, String);

/// What one account may have, kept as long as one of its streams is open.
#[derive(Debug)]
pub(crate) struct Grant {
    account: Account,
    /// There is something to be had.
    wanted: AtomicBool,
    allowed: AtomicBool,
    /// Somebody was told that it is not.
    refused: AtomicBool,
}

/// The accounts that are connected.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    by_account: Mutex<HashMap<Account, Weak<Grant>>>,
    asked: Notify,
}

impl Grants {
    /// What `account` may have; `allowed` if nothing was known of it.
    pub(crate) fn of(&self, account: Account, allowed: bool) -> Arc<Grant> {
        let mut known = self.by_account.lock();
        if let Some(grant) = known.get(&account).and_then(Weak::upgrade) {
            return grant;
        }
        known.retain(|_, grant| grant.strong_count() > 0);
        let [wanted, allowed, refused] = [false, allowed, false].map(AtomicBool::new);
        let grant = Arc::new(Grant { account: account.clone(), wanted, allowed, refused });
        known.insert(account, Arc::downgrade(&grant));
        grant
    }

    /// Whether private keys may be sent. The first question makes [`Grants::review`] ask.
    pub(crate) fn allows(&self, grant: &Grant) -> bool {
        if !grant.wanted.swap(true, Ordering::Relaxed) {
            self.asked.notify_one();
        }
        grant.allowed.load(Ordering::Relaxed)
    }

    /// Asks the API server, now and again, until the drain; streams are served anew when an answer changes. An API server
    /// that does not answer changes nothing.
    pub(crate) async fn review(state: Arc<State>, reviewer: AccessReviewer, mut drain: drain::Watch) {
        let mut pause = AGAIN.0;
        loop {
            tokio::select! {
                _ = drain.signaled() => return,
                () = state.grants().asked.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            let known: Vec<_> = state.grants().by_account.lock().values().filter_map(Weak::upgrade).collect();
            pause = AGAIN.0;
            for grant in known.iter().filter(|grant| grant.wanted.load(Ordering::Relaxed)) {
                let (namespace, name) = &grant.account;
                match reviewer.may_list_secrets(namespace, name).await {
                    Ok(allowed) => {
                        if grant.allowed.swap(allowed, Ordering::Relaxed) != allowed {
                            tracing::info!(
                                namespace,
                                account = name,
                                allowed,
                                "private keys of its namespace's Secrets"
                            );
                            state.serve_anew();
                        } else if !allowed && !grant.refused.swap(true, Ordering::Relaxed) {
                            tracing::warn!(
                                namespace,
                                account = name,
                                "no private keys are sent: the account may not list the Secrets of its namespace"
                            );
                        }
                    }
                    Err(error) => tracing::warn!(namespace, account = name, error, "access is not known"),
                }
                if !grant.allowed.load(Ordering::Relaxed) {
                    pause = AGAIN.1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str) -> Account {
        ("shop".to_owned(), name.to_owned())
    }

    #[test]
    fn an_account_has_one_grant_as_long_as_somebody_holds_it() {
        let grants = Grants::default();
        let first = grants.of(account("waypoint"), false);
        first.allowed.store(true, Ordering::Relaxed);
        assert!(grants.allows(&grants.of(account("waypoint"), false)));
        assert!(!grants.allows(&grants.of(account("other"), false)));
        drop(first);
        assert!(!grants.allows(&grants.of(account("waypoint"), false)));
    }
}
