//! One mistake in the configuration, told so that its writer finds it.
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How bad a [`Fault`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is in force; something about it is ignored or suspicious.
    Warning,
    /// What is described is not in force; the last good version stays, if there was one.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Warning => "warning",
            Severity::Error => "error",
        })
    }
}

/// Where an object or field was read. Line 0 means "unknown".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    pub file: Arc<Path>,
    /// Counted from 1.
    pub line: u32,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// One mistake: which file and line, which object, which field, why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fault {
    pub severity: Severity,
    /// The file, if the fault comes from one.
    pub file: Option<PathBuf>,
    /// Line in `file`, from 1; 0 is unknown.
    pub line: u32,
    /// `Kind namespace/name`; empty if the fault concerns a whole file.
    pub object: String,
    /// Path of the field as a user would write it, `spec.http[0].route[1].weight`; empty for the whole object.
    pub field: String,
    pub reason: String,
}

impl Fault {
    /// An error about a field of an object whose file the caller may add by [`Fault::at`].
    pub fn error(object: impl Into<String>, field: impl Into<String>, reason: impl Into<String>) -> Fault {
        Fault {
            severity: Severity::Error,
            file: None,
            line: 0,
            object: object.into(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// As [`Fault::error`], for what does not keep the object out of force.
    pub fn warning(object: impl Into<String>, field: impl Into<String>, reason: impl Into<String>) -> Fault {
        Fault { severity: Severity::Warning, ..Fault::error(object, field, reason) }
    }

    /// The same fault with its place.
    #[must_use]
    pub fn at(mut self, location: &Location) -> Fault {
        self.file = Some(location.file.to_path_buf());
        self.line = location.line;
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            if self.line > 0 {
                write!(f, "{}:", self.line)?;
            }
            f.write_str(" ")?;
        }
        write!(f, "{}: ", self.severity)?;
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)
    }
}
