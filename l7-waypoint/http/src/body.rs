//! Bodies as they pass through: the request's, which may have to be sent again, and the response's, whose end is the
//! end of the request.

mod request;
mod response;

pub(crate) use request::{RequestBody, Upload};
pub(crate) use response::{Deadline, OnEnd, ResponseBody, Stop};

/// What hyper takes as a body's error.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
