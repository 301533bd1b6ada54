//! The waypoint's configuration in Envoy's dialect: listeners, clusters and endpoints become one plain
//! [`WaypointConfig`].
//!
//! Every message is destructured whole. A set field is honoured, refused by name or noticed by name:
//! - a [`Rejection`] is for a resource: it goes into a NACK;
//! - a [`Notice`] is for a field without effect here, or (`Effect::FailsClosed`) for a part that answers
//!   with an error because it could not be honoured.
//!
//! Nothing here does I/O, compiles a regex or decides a request.
mod translate;

pub mod chain;
pub mod cluster;
pub mod ext_authz;
pub mod filter;
pub mod jwt;
pub mod matcher;
pub mod rbac;
pub mod route;
pub mod telemetry;

pub use chain::WaypointConfig;
pub use translate::{Effect, JWT_AUTHN, Notice, Rejection, Resources, Translation, translate};
