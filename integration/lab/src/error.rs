//! What can go wrong.
use std::fmt;

/// Why the lab could not do something; says what it was doing.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("`{command}` failed: {output}")]
    Command { command: String, output: String },
    #[error("waited {seconds} s for {what}{detail}")]
    Timeout { what: String, seconds: u64, detail: String },
    /// The machine cannot run a lab.
    #[error("{0}")]
    Machine(String),
    #[error("a mesh named {0:?} runs already; stop it first (Ctrl-C where it runs)")]
    Taken(String),
    #[error("{0}")]
    Other(String),
}

impl LabError {
    /// An error of nothing but text.
    pub fn other(text: impl fmt::Display) -> LabError {
        LabError::Other(text.to_string())
    }
}

/// Names what was being done.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> crate::Result<T>;
}

impl<T, E: Into<std::io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> crate::Result<T> {
        self.map_err(|source| LabError::Io { what: what.to_string(), source: source.into() })
    }
}
