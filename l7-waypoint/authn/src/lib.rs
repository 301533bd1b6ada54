//! JWT authentication as Envoy's `jwt_authn` filter does it: which token is taken from where, how it is verified,
//! what the upstream and the filters after it get to see, and what is answered when it is no good.
//!
//! Keys and requirements are compiled when the configuration arrives; per request nothing is parsed but the token,
//! and a token verified before is found in the worker's cache. Fetching remote keys goes through a trait: this crate
//! opens no connections. Anything not understood fails closed.

mod cache;
mod edits;
mod extract;
mod keys;
mod requirement;
mod rule;
mod status;
mod store;
mod token;
mod verify;

pub use cache::TokenCache;
pub use edits::Edits;
pub use keys::KeySet;
pub use requirement::{Authenticated, Authenticator, CompileError, Denied, Request};
pub use status::Status;
pub use store::{Fetch, JwksStore, RemoteSource};
