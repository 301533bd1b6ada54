//! Asks the agent.
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::code;
use crate::protocol::{Failure, MAX_LINE, Request, Response};

/// Below the runtimes' own limits (containerd and CRI-O allow two minutes for all plugins of a pod).
const TIMEOUT: Duration = Duration::from_secs(60);

/// Sends one request and waits for its answer.
pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Response, Failure> {
    let away = |error: std::io::Error| {
        Failure::new(code::TRY_AGAIN_LATER, "the strata agent does not answer")
            .because(format!("{}: {error}", socket.display()))
    };
    let mut stream = UnixStream::connect(socket).map_err(away)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(away)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(away)?;
    let mut line = serde_json::to_vec(request)
        .map_err(|error| Failure::new(code::IO, "request could not be written").because(error))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(away)?;
    let mut answer = String::new();
    match BufReader::new(stream.take(MAX_LINE)).read_line(&mut answer) {
        Ok(0) => Err(away(ErrorKind::UnexpectedEof.into())),
        Ok(_) => serde_json::from_str(&answer)
            .map_err(|error| Failure::new(code::IO, "the agent's answer could not be understood").because(error)),
        Err(error) => Err(away(error)),
    }
}
