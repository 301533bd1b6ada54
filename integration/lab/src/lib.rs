//! A two-node mesh on one machine: nodes and pods are network namespaces, processes are the ones a cluster runs.
//!
//! The lab plays kubelet, container runtime (it executes the CNI plugin as one does), endpoint controller and network
//! between the nodes, and nothing else: it must not reach into what it runs except by files, sockets and signals.
mod cleanup;
mod client;
mod cni;
mod endpoints;
mod error;
mod ground;
mod kubelet;
mod lab;
mod network;
mod paths;
mod process;
pub mod scenes;
mod sys;

pub use cleanup::{remove, sweep, traces, watch};
pub use client::{Call, Connect, Running};
pub use error::LabError;
pub use ground::Ground;
pub use lab::{Capture, Lab, Options};
pub use network::{WORLD_GATEWAY, WORLD_ISSUER};
pub use paths::{Description, NodeDescription, running};
pub use sys::check_privileges;

/// Result of what the lab does.
pub type Result<T> = std::result::Result<T, LabError>;
