//! The CNI plugin (CNI specification 0.4.0 to 1.1.0) as a thin client of the agent, and the protocol between the two.
//!
//! The plugin decides nothing: it checks what the runtime gave it, asks the agent over one unix socket, and writes
//! the answer in the words of the version the network configuration asks for. It keeps no state.
mod client;
mod input;
mod output;
mod plugin;
pub mod protocol;
mod version;

pub use plugin::{Outcome, run};
pub use version::{SUPPORTED, Version};

/// Error codes: 1 to 99 are the specification's, 100 and up are this plugin's.
pub mod code {
    /// The configuration's `cniVersion` is not one of [`crate::SUPPORTED`], or has no such command.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is not known, or its namespace is gone.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A variable of the environment is missing or malformed; the message names it.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    /// The configuration is not JSON.
    pub const DECODE: u32 = 6;
    pub const INVALID_CONFIG: u32 = 7;
    /// The agent does not answer or is not ready: the runtime should try again.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: ADD would not succeed now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: ADD would not succeed and existing pods may have limited connectivity.
    pub const LIMITED_CONNECTIVITY: u32 = 51;
    /// The attachment exists with another namespace, or the pod with another container.
    pub const ALREADY_EXISTS: u32 = 101;
    /// The node's range has no free address.
    pub const NO_ADDRESS: u32 = 102;
    /// The kernel refused a step; the message says which.
    pub const NETWORK: u32 = 103;
    /// CHECK: something that ADD made is missing or different; the message says what.
    pub const CHECK_FAILED: u32 = 104;
}
