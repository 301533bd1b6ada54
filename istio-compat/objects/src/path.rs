//! The path of a field inside an object.
use std::fmt;

/// One step of a [`FieldPath`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Segment {
    Key(String),
    Index(usize),
}

impl From<&str> for Segment {
    fn from(key: &str) -> Segment {
        Segment::Key(key.to_owned())
    }
}

impl From<&String> for Segment {
    fn from(key: &String) -> Segment {
        Segment::Key(key.clone())
    }
}

impl From<usize> for Segment {
    fn from(index: usize) -> Segment {
        Segment::Index(index)
    }
}

/// Path of a field, written `spec.http[0].match[1].headers["x.y"]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FieldPath(pub Vec<Segment>);

impl FieldPath {
    /// The path of `spec`.
    pub fn spec() -> FieldPath {
        FieldPath::default().to("spec")
    }

    /// One step further down.
    #[must_use]
    pub fn to(&self, segment: impl Into<Segment>) -> FieldPath {
        let mut path = self.clone();
        path.0.push(segment.into());
        path
    }

    pub(crate) fn of_error(path: &serde_path_to_error::Path) -> FieldPath {
        use serde_path_to_error::Segment as S;
        let steps = path.iter().filter_map(|segment| match segment {
            S::Seq { index } => Some(Segment::Index(*index)),
            S::Map { key } => Some(Segment::Key(key.clone())),
            S::Enum { .. } | S::Unknown => None,
        });
        FieldPath(steps.collect())
    }

    pub(crate) fn of_ignored(path: &serde_ignored::Path<'_>) -> FieldPath {
        use serde_ignored::Path as P;
        match path {
            P::Root => FieldPath::default(),
            P::Seq { parent, index } => FieldPath::of_ignored(parent).to(*index),
            P::Map { parent, key } => FieldPath::of_ignored(parent).to(key.as_str()),
            P::Some { parent } | P::NewtypeStruct { parent } | P::NewtypeVariant { parent } => {
                FieldPath::of_ignored(parent)
            }
        }
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) if key.contains(['.', '/', '[', ' ']) || key.is_empty() => write!(f, "[{key:?}]")?,
                Segment::Key(key) if i == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}
