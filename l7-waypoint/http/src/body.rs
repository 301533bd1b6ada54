//! Bodies as they pass through: the request's, which may have to be sent again, and the response's, whose end is the
//! end of the request.

mod inbound;
mod messages;
mod request;
mod response;

pub(crate) use inbound::{Beginning, Inbound};
pub(crate) use messages::Messages;
pub(crate) use request::{RequestBody, Upload};
pub(crate) use response::{Deadline, OnEnd, Passed, ResponseBody, Stop};

/// What hyper takes as a body's error.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
