//! Rewrites of path and host.
use regex::Regex;
use xds_model::envoy::route::PathRewrite as Config;

use crate::CompileError;
use crate::matching::PathMatch;

/// A regex whose matches are all replaced, with RE2's `\1` references.
#[derive(Debug, Clone)]
pub struct Substitution {
    regex: Regex,
    replacement: Box<str>,
}

impl Substitution {
    /// Compiles.
    ///
    /// # Errors
    /// If the pattern is no regex, or the text refers to a group that is not there.
    pub fn compile(pattern: &str, substitution: &str) -> Result<Self, CompileError> {
        let wrong = |reason: String| CompileError::Rewrite { pattern: pattern.to_owned(), reason };
        let regex = Regex::new(pattern).map_err(|error| wrong(error.to_string()))?;
        let mut replacement = String::new();
        let mut chars = substitution.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => match chars.next() {
                    Some(digit) if digit.is_ascii_digit() => {
                        let group = digit as usize - '0' as usize;
                        if group >= regex.captures_len() {
                            return Err(wrong(format!("there is no group {group}")));
                        }
                        replacement.push_str(&format!("${{{group}}}"));
                    }
                    Some('\\') => replacement.push('\\'),
                    other => return Err(wrong(format!("\\{other:?} in the substitution"))),
                },
                '$' => replacement.push_str("$$"),
                c => replacement.push(c),
            }
        }
        Ok(Self { regex, replacement: replacement.into() })
    }

    /// Replaces all matches.
    pub fn apply(&self, text: &str) -> String {
        self.regex.replace_all(text, &*self.replacement).into_owned()
    }
}

/// A compiled path rewrite.
#[derive(Debug, Clone)]
pub enum PathRewrite {
    Prefix(Box<str>),
    Regex(Substitution),
    Full(Box<str>),
}

impl PathRewrite {
    pub(crate) fn compile(config: &Config) -> Result<Self, CompileError> {
        Ok(match config {
            Config::Prefix(prefix) => Self::Prefix(prefix.as_str().into()),
            Config::Regex { pattern, substitution } => Self::Regex(Substitution::compile(pattern, substitution)?),
            Config::Full(path) => Self::Full(path.as_str().into()),
            Config::UriTemplate(template) => {
                return Err(CompileError::Rewrite {
                    pattern: template.clone(),
                    reason: "URI template rewrites are not supported".to_owned(),
                });
            }
        })
    }

    /// The new path (without query) for a path that `matched` matched.
    pub(crate) fn apply(&self, path: &str, matched: &PathMatch) -> String {
        match self {
            Self::Prefix(replacement) => replace_prefix(path, matched, replacement),
            Self::Regex(substitution) => substitution.apply(path),
            Self::Full(path) => path.to_string(),
        }
    }
}

/// Puts `replacement` in the place of what a prefix or exact matcher matched; for other matchers that is everything.
pub(crate) fn replace_prefix(path: &str, matched: &PathMatch, replacement: &str) -> String {
    let length = matched.matched_length(path);
    // Only whole characters are matched, so the rest starts at a boundary; were it not so, all is replaced.
    format!("{replacement}{}", path.get(length..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn re2_references() {
        let rewrite = Substitution::compile("/re/(.*)/x", r"/y/\1$").expect("compiles");
        assert_eq!(rewrite.apply("/re/a/b/x"), "/y/a/b$");
        assert_eq!(rewrite.apply("/other"), "/other");
        assert!(Substitution::compile("a", r"\1").is_err());
        assert!(Substitution::compile("(", "").is_err());
    }
}
