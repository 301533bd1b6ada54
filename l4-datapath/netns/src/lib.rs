//! Network namespaces, devices, addresses, routes and rules: the only user of netlink.
//!
//! Everything is idempotent (doing it twice is doing it once) and says what could not be done to which device,
//! address or namespace. This crate knows no pods' objects and no policy: callers say what to wire.
mod capture;
mod error;
mod namespace;
mod netlink;
mod node;
mod pod;
mod sysctl;

pub use capture::{Capture, disable_capture, enable_capture};
pub use error::Error;
pub use namespace::{NetnsId, PersistentNetns, cookie_of, current, id_of, open, run_in};
pub use netlink::{Link, MAX_ALIAS, Netlink, PROTOCOL};
pub use node::{NodeRoute, prepare_node, sync_node_routes};
pub use pod::{PodWiring, Wired, activate, check, gateway, host_device_name, mac_of, pod_link, unwire, wire};
pub use sysctl::{get as sysctl_get, set as sysctl_set};
