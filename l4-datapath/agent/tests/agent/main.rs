//! The real agent and the real CNI plugin on nodes and pods that are network namespaces. Needs root.
mod capture;
mod cni;
mod edge;
mod node;
mod policy;
