//! Kernel flow records -> named flows, metrics and a live stream.
//!
//! A flow is one decision of the lower layer about a connection or first packet, in the words of Kubernetes objects.
//! Names come from a [`Resolver`]; this crate knows no objects, no maps and no kernel.
mod clock;
mod flow;
mod metrics;
mod names;
mod publish;

pub use clock::BootClock;
pub use flow::{Endpoint, Flow, Layer, PolicyName, Refusal, Resolver, resolve, resolve_refusal};
pub use metrics::Metrics;
pub use names::{drop_reason, hook, protocol, verdict};
pub use publish::Publisher;
