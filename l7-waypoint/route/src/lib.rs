//! Pure: compiled configuration + request + seed -> routing decision, with its reasons.
//!
//! [`Snapshot::compile`] turns a [`xds_model::envoy::WaypointConfig`] into an immutable [`Snapshot`]; everything a
//! request needs is looked up in it without locks and, but for rewrites, without allocation. Nothing here does I/O,
//! keeps state between requests or draws random numbers: the caller gives a seed.

pub mod chain;
mod decision;
pub mod explain;
pub mod ext_authz;
pub mod filter;
pub mod format;
pub mod hash;
pub mod headers;
mod matching;
pub mod path;
pub mod redirect;
pub mod rewrite;
pub mod route;
pub mod snapshot;

pub use chain::{Chain, ChainKind, ClusterRef, FilterKind, HttpChain, HttpFilter, TcpChain};
pub use explain::{Explained, Why};
pub use format::FormatContext;
pub use l7_authz::l7::{AuthzRequest, HeaderKey, RequestView};
pub use path::{NormalizedPath, normalize_path};
pub use route::{Decision, Forward, Route, Verdict};
pub use snapshot::{Dispatch, Snapshot, Sniffed};

/// A part of the configuration that can't be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    #[error(transparent)]
    Matcher(#[from] l7_authz::l7::matcher::MatcherError),
    #[error("header {0:?}: not a name that may be changed")]
    HeaderName(String),
    #[error("format {format:?}: {reason}")]
    Format { format: String, reason: String },
    #[error("rewrite {pattern:?}: {reason}")]
    Rewrite { pattern: String, reason: String },
}

/// A well-mixed number from a seed and a salt, so that one seed serves several independent draws of one request.
pub(crate) fn draw(seed: u64, salt: u64) -> u64 {
    // SplitMix64 (Steele, Lea, Flood 2014).
    let mut z = seed.wrapping_add(salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
