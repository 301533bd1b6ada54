//! Plain types decoded from xDS: workloads, services, L4 policies, and the waypoint's configuration.
//!
//! The wire messages are destructured whole here, so that a field the control plane sets is honoured,
//! refused by name or ignored on purpose. Nothing here does I/O, and nothing here decides a request.

pub mod envoy;
pub mod spiffe;
pub mod wds;
