//! What keeps one failing upstream from failing the caller: retries, budgets, outlier detection, circuit
//! breaking and load balancing. Pure: no IO, no clock (`now` in milliseconds of a monotonic clock is passed
//! in), no knowledge of xDS. State that all workers share is atomics, so nothing here waits on a lock while a
//! request runs. It must not depend on hyper, tokio or the configuration model.

pub mod breaker;
pub mod cluster;
pub mod deadline;
pub mod host;
pub mod lb;
pub mod outlier;
pub mod random;
pub mod retry;

pub use breaker::{Breakers, Guard, Kind, Limits, RetryBudget};
pub use cluster::{Cluster, ClusterSpec, HostSpec, Pick, States};
pub use host::{Health, HostState};
pub use lb::{LbPolicy, SlowStart};
pub use outlier::{Outcome, OutlierConfig};
pub use random::Rng;
pub use retry::{Backoff, Reset, RetryOn, RetryPolicy};
