//! The engine from client to upstream, in one process: real HTTP on both sides over in-memory pipes, upstreams that do
//! what a test asks of them, configuration built by hand or as a real istiod recorded it.

#[path = "engine/config.rs"]
mod config;
#[path = "engine/ext_authz.rs"]
mod ext_authz;
#[path = "engine/ext_authz_http.rs"]
mod ext_authz_http;
#[path = "engine/ext_authz_policy.rs"]
mod ext_authz_policy;
#[path = "engine/limits.rs"]
mod limits;
#[path = "engine/protocols.rs"]
mod protocols;
#[path = "engine/recorded.rs"]
mod recorded;
#[path = "engine/resilience.rs"]
mod resilience;
#[path = "engine/routing.rs"]
mod routing;
#[path = "engine/smuggling.rs"]
mod smuggling;
#[path = "engine/support.rs"]
mod support;
#[path = "engine/tcp.rs"]
mod tcp;
#[path = "engine/trace.rs"]
mod trace;
