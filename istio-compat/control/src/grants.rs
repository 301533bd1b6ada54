//! Which service accounts are sent private keys: those that may read the Secrets of their namespace anyway (istiod's rule).
//! Nobody is before somebody has said so.
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use compat_kubernetes::AccessReviewer;
use parking_lot::Mutex;
use strata_runtime::drain;

use crate::accounts::Accounts;
use crate::state::State;

/// How often the API server is asked whether a right has come that was missing, and how many times less whether one is still there.
const PERIOD: Duration = Duration::from_secs(10);
const SELDOM: u64 = 6;

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Account {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

/// What one account may have, kept as long as one of its streams is open.
#[derive(Debug)]
pub(crate) struct Grant {
    account: Account,
    allowed: AtomicBool,
    /// There is something to be had.
    wanted: AtomicBool,
}

impl Grant {
    /// What an account may have from now on.
    pub(crate) fn new(account: Account, allowed: bool) -> Arc<Grant> {
        Arc::new(Grant { account, allowed: AtomicBool::new(allowed), wanted: AtomicBool::new(false) })
    }

    /// Whether private keys may be sent, of which there are some.
    pub(crate) fn allows(&self) -> bool {
        let allowed = self.allowed.load(Ordering::Relaxed);
        if !self.wanted.swap(true, Ordering::Relaxed) && !allowed {
            let Account { namespace, name } = &self.account;
            tracing::warn!(
                namespace,
                account = name,
                "no private keys are sent: the account may not list the Secrets of its namespace"
            );
        }
        allowed
    }

    /// Takes in an answer; true if it is another one.
    fn take(&self, allowed: bool) -> bool {
        let is_new = self.allowed.swap(allowed, Ordering::Relaxed) != allowed;
        if is_new {
            let Account { namespace, name } = &self.account;
            tracing::info!(namespace, account = name, allowed, "private keys of the namespace's Secrets");
        }
        is_new
    }
}

/// The accounts that are connected and were asked for.
#[derive(Debug, Default)]
pub(crate) struct Grants(Mutex<HashMap<Account, Weak<Grant>>>);

impl Grants {
    /// What an account may have, as the API server says.
    ///
    /// # Errors
    /// That it does not say, and why.
    pub(crate) async fn asked(&self, account: Account, reviewer: &AccessReviewer) -> Result<Arc<Grant>, String> {
        if let Some(grant) = self.known(&account) {
            return Ok(grant);
        }
        let allowed = reviewer.may_list_secrets(&account.namespace, &account.name).await?;
        Ok(self.keep(Grant::new(account, allowed)))
    }

    fn known(&self, account: &Account) -> Option<Arc<Grant>> {
        self.0.lock().get(account)?.upgrade()
    }

    /// Of two that come at once the first one counts.
    fn keep(&self, grant: Arc<Grant>) -> Arc<Grant> {
        let mut known = self.0.lock();
        known.retain(|_, grant| grant.strong_count() > 0);
        let held = known.entry(grant.account.clone()).or_insert_with(|| Arc::downgrade(&grant));
        held.upgrade().unwrap_or(grant)
    }

    /// Asks again, now and then, until the drain, for those that have something to gain or lose; streams are served anew when an
    /// answer changes. An API server that does not answer changes nothing.
    pub(crate) async fn review(state: Arc<State>, mut drain: drain::Watch) {
        let Accounts::Cluster(accounts) = state.accounts() else { return };
        for round in 1_u64.. {
            tokio::select! {
                _ = drain.signaled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            let known: Vec<_> = state.grants().0.lock().values().filter_map(Weak::upgrade).collect();
            let due = |grant: &&Arc<Grant>| {
                let missing = !grant.allowed.load(Ordering::Relaxed);
                grant.wanted.load(Ordering::Relaxed) && (missing || round % SELDOM == 0)
            };
            for grant in known.iter().filter(due) {
                let Account { namespace, name } = &grant.account;
                match accounts.access.may_list_secrets(namespace, name).await {
                    Ok(allowed) if grant.take(allowed) => state.serve_anew(),
                    Ok(_) => {}
                    Err(error) => tracing::warn!(namespace, account = name, error, "access is not known"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_has_one_grant_as_long_as_somebody_holds_it() {
        let account = |name: &str| Account { namespace: "shop".to_owned(), name: name.to_owned() };
        let grants = Grants::default();
        let first = grants.keep(Grant::new(account("waypoint"), false));
        assert!(first.take(true) && !first.take(true));
        assert!(grants.keep(Grant::new(account("waypoint"), false)).allows());
        assert!(!grants.keep(Grant::new(account("other"), false)).allows());
        drop(first);
        assert!(grants.known(&account("waypoint")).is_none());
    }
}
