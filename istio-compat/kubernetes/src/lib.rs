//! The Kubernetes API as a source of objects: the same [`compat_objects::source::Snapshot`]s that folders of YAML give,
//! and the few writes Strata makes there.
//!
//! One watcher per [`Stream`] lists in pages and follows with bookmarks. What was listed stays known whatever happens
//! to the API server, and a list taken again keeps every object that did not change, so that an outage or a relist
//! changes nothing. Objects of the many (pods, nodes, services, slices) are cut down while they are decoded to the
//! fields Strata reads. It knows neither layer and nothing of what objects mean.
mod access;
mod backoff;
mod events;
mod keep;
mod known;
mod pods;
mod presence;
mod removal;
mod reviews;
mod scope;
mod secrets;
mod slim;
mod source;
mod statuses;
mod stream;
mod upkeep;

pub use access::{Access, AccessError, ApiServer, SERVICE_ACCOUNT};
pub use events::{About, EventWriter, Note};
pub use pods::{PodId, PodWriter, REDIRECTION};
pub use presence::Presence;
pub use removal::{RemovalError, remove_daemon_set};
pub use reviews::{AccessReviewer, ReviewError, Reviewed, TokenReviewer};
pub use scope::{Scope, Stream};
pub use secrets::{SecretData, SecretError, secret, secret_or_new};
pub use source::{Counters, KubernetesSource, Named};
pub use statuses::{Said, Status, StatusWriter};
pub use upkeep::{Kept, KeptId, Looked, Others, Troubles, Upkeep, Wanted};
