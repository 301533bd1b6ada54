//! Compiled matchers. Regexes have RE2's full-match meaning; values are bytes, as on the wire.
use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;
use xds_model::envoy::JWT_AUTHN;
use xds_model::envoy::matcher::{
    HeaderMatcher, HeaderTest, MetadataMatcher, QueryMatcher, QueryTest, StringMatcher, StringPattern, ValueMatcher,
};

use super::request::{HeaderKey, RequestView};

/// A matcher that can't be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatcherError {
    #[error("regex {regex:?}: {reason}")]
    Regex { regex: String, reason: String },
    #[error("{0:?} is not a header name")]
    HeaderName(String),
    #[error("metadata {0:?} is not known")]
    Metadata(String),
    #[error("URI template {template:?}: {reason}")]
    Template { template: String, reason: &'static str },
}

/// Compiles an RE2 text that must match the whole value. RE2's `\d`, `\w` and `\s` are ASCII; patterns that name
/// non-ASCII characters in classes are compiled with Unicode on.
///
/// # Errors
/// If the text is no regex or too large.
pub fn full_regex(text: &str) -> Result<Regex, MatcherError> {
    let build =
        |text: &str| RegexBuilder::new(text).unicode(false).build().or_else(|_| RegexBuilder::new(text).build());
    // The text must be a regex by itself: "a)|(b" would escape from the anchors.
    build(text)
        .and_then(|_| build(&format!("^(?:{text})$")))
        .map_err(|error| MatcherError::Regex { regex: text.to_owned(), reason: error.to_string() })
}

/// A compiled string matcher.
#[derive(Debug, Clone)]
pub struct StringMatch {
    pattern: Pattern,
    ignore_case: bool,
}

#[derive(Debug, Clone)]
enum Pattern {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    Contains(Box<[u8]>),
    Regex(Regex),
}

impl StringMatch {
    /// Compiles.
    ///
    /// # Errors
    /// If a regex does not compile.
    pub fn compile(matcher: &StringMatcher) -> Result<Self, MatcherError> {
        let bytes = |text: &str| {
            let text = if matcher.ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
            text.into_bytes().into_boxed_slice()
        };
        let pattern = match &matcher.pattern {
            StringPattern::Exact(text) => Pattern::Exact(bytes(text)),
            StringPattern::Prefix(text) => Pattern::Prefix(bytes(text)),
            StringPattern::Suffix(text) => Pattern::Suffix(bytes(text)),
            StringPattern::Contains(text) => Pattern::Contains(bytes(text)),
            StringPattern::Regex(text) => Pattern::Regex(full_regex(text)?),
        };
        Ok(Self { pattern, ignore_case: matcher.ignore_case })
    }

    /// Compiles a list.
    ///
    /// # Errors
    /// If a regex does not compile.
    pub fn compile_all(matchers: &[StringMatcher]) -> Result<Box<[Self]>, MatcherError> {
        matchers.iter().map(Self::compile).collect()
    }

    /// Whether the value matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        let eq = |a: &[u8], b: &[u8]| if self.ignore_case { a.eq_ignore_ascii_case(b) } else { a == b };
        match &self.pattern {
            Pattern::Exact(wanted) => eq(value, wanted),
            Pattern::Prefix(wanted) => value.get(..wanted.len()).is_some_and(|head| eq(head, wanted)),
            Pattern::Suffix(wanted) => value.len() >= wanted.len() && eq(&value[value.len() - wanted.len()..], wanted),
            Pattern::Contains(wanted) => {
                wanted.is_empty() || value.windows(wanted.len()).any(|window| eq(window, wanted))
            }
            Pattern::Regex(regex) => regex.is_match(value),
        }
    }
}

/// A compiled header test.
#[derive(Debug, Clone)]
pub struct HeaderMatch {
    key: HeaderKey,
    test: Test,
    invert: bool,
    missing_as_empty: bool,
}

#[derive(Debug, Clone)]
enum Test {
    Present(bool),
    Value(StringMatch),
    Range(std::ops::Range<i64>),
}

impl HeaderMatch {
    /// Compiles.
    ///
    /// # Errors
    /// If the name or a regex is not valid.
    pub fn compile(matcher: &HeaderMatcher) -> Result<Self, MatcherError> {
        let HeaderMatcher { name, test, invert, missing_as_empty } = matcher;
        let test = match test {
            HeaderTest::Present(present) => Test::Present(*present),
            HeaderTest::Value(text) => Test::Value(StringMatch::compile(text)?),
            HeaderTest::Range { start, end } => Test::Range(*start..*end),
        };
        let key = HeaderKey::new(name).ok_or_else(|| MatcherError::HeaderName(name.clone()))?;
        Ok(Self { key, test, invert: *invert, missing_as_empty: *missing_as_empty })
    }

    /// Compiles a list.
    ///
    /// # Errors
    /// If a name or regex is not valid.
    pub fn compile_all(matchers: &[HeaderMatcher]) -> Result<Box<[Self]>, MatcherError> {
        matchers.iter().map(Self::compile).collect()
    }

    /// Whether the request matches. A missing header fails a test on its value, inverted or not, unless it is to
    /// count as empty.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        self.matches_value(request.header(&self.key).as_deref())
    }

    /// The same on plain headers (of a response).
    pub fn matches_headers(&self, headers: &http::HeaderMap) -> bool {
        match &self.key {
            HeaderKey::Name(name) => self.matches_value(super::request::joined(headers, name).as_deref()),
            _ => self.matches_value(None),
        }
    }

    fn matches_value(&self, value: Option<&[u8]>) -> bool {
        if let Test::Present(wanted) = self.test {
            return (value.is_some() == wanted) != self.invert;
        }
        let value = match value {
            Some(value) => value,
            None if self.missing_as_empty => b"",
            None => return false,
        };
        let outcome = match &self.test {
            Test::Present(_) => return false,
            Test::Value(text) => text.matches(value),
            Test::Range(range) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .is_some_and(|number| range.contains(&number)),
        };
        outcome != self.invert
    }
}

/// A compiled query parameter test.
#[derive(Debug, Clone)]
pub struct QueryMatch {
    name: Box<str>,
    test: Test,
}

impl QueryMatch {
    /// Compiles.
    ///
    /// # Errors
    /// If a regex does not compile.
    pub fn compile(matcher: &QueryMatcher) -> Result<Self, MatcherError> {
        let test = match &matcher.test {
            QueryTest::Present(present) => Test::Present(*present),
            QueryTest::Value(text) => Test::Value(StringMatch::compile(text)?),
        };
        Ok(Self { name: matcher.name.as_str().into(), test })
    }

    /// Whether the request matches.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        match (&self.test, request.query_parameter(&self.name)) {
            (Test::Present(wanted), value) => value.is_some() == *wanted,
            (Test::Value(text), Some(value)) => text.matches(&value),
            _ => false,
        }
    }
}

/// A compiled test on a JSON value.
#[derive(Debug, Clone)]
pub enum ValueMatch {
    Null,
    Number(f64),
    NumberRange { start: f64, end: f64 },
    String(StringMatch),
    Bool(bool),
    Present(bool),
    List(Box<ValueMatch>),
    Or(Box<[ValueMatch]>),
}

impl ValueMatch {
    /// Compiles.
    ///
    /// # Errors
    /// If a regex does not compile.
    pub fn compile(matcher: &ValueMatcher) -> Result<Self, MatcherError> {
        Ok(match matcher {
            ValueMatcher::Null => Self::Null,
            ValueMatcher::Number(wanted) => Self::Number(*wanted),
            ValueMatcher::NumberRange { start, end } => Self::NumberRange { start: *start, end: *end },
            ValueMatcher::String(text) => Self::String(StringMatch::compile(text)?),
            ValueMatcher::Bool(wanted) => Self::Bool(*wanted),
            ValueMatcher::Present(wanted) => Self::Present(*wanted),
            ValueMatcher::List(one) => Self::List(Box::new(Self::compile(one)?)),
            ValueMatcher::Or(list) => Self::Or(list.iter().map(Self::compile).collect::<Result<_, _>>()?),
        })
    }

    /// Whether the value (`None`: there is none) matches.
    #[expect(clippy::float_cmp, reason = "the configured number must be met exactly, as in Envoy")]
    pub fn matches(&self, value: Option<&Value>) -> bool {
        match self {
            Self::Present(wanted) => value.is_some() == *wanted,
            Self::Or(list) => list.iter().any(|one| one.matches(value)),
            Self::Null => value.is_some_and(Value::is_null),
            Self::Number(wanted) => value.and_then(Value::as_f64).is_some_and(|number| number == *wanted),
            Self::NumberRange { start, end } => {
                value.and_then(Value::as_f64).is_some_and(|number| *start <= number && number < *end)
            }
            Self::String(text) => value.and_then(Value::as_str).is_some_and(|value| text.matches(value.as_bytes())),
            Self::Bool(wanted) => value.and_then(Value::as_bool) == Some(*wanted),
            Self::List(one) => {
                value.and_then(Value::as_array).is_some_and(|list| list.iter().any(|item| one.matches(Some(item))))
            }
        }
    }
}

/// A compiled test on the claims of the verified JWT.
#[derive(Debug, Clone)]
pub struct ClaimMatch {
    path: Box<[String]>,
    value: ValueMatch,
    invert: bool,
}

impl ClaimMatch {
    /// Compiles. The metadata must be `jwt_authn`'s, and the path start with the payload's key.
    ///
    /// # Errors
    /// If it is other metadata, or a regex does not compile.
    pub fn compile(matcher: &MetadataMatcher) -> Result<Self, MatcherError> {
        let MetadataMatcher { filter, path, value, invert } = matcher;
        let [_payload, claims @ ..] = path.as_slice() else {
            return Err(MetadataError::of(filter, path));
        };
        if filter != JWT_AUTHN {
            return Err(MetadataError::of(filter, path));
        }
        Ok(Self { path: claims.into(), value: ValueMatch::compile(value)?, invert: *invert })
    }

    /// Whether the claims match; without a token every claim is absent.
    pub fn matches(&self, claims: Option<&Value>) -> bool {
        let value = self.path.iter().try_fold(claims, |value, key| Some(value?.get(key))).flatten();
        self.value.matches(value) != self.invert
    }
}

struct MetadataError;

impl MetadataError {
    fn of(filter: &str, path: &[String]) -> MatcherError {
        MatcherError::Metadata(format!("{filter}: {}", path.join(".")))
    }
}

/// Compiles an Envoy URI template to a regex on the path. `*` and `{name}` are one segment that is not empty, `**`
/// and `{name=**}` any rest; `{name=a/*}` is what it says. Any character but `/` may be in a segment (Envoy's
/// grammar leaves some out, such as `=`, which could only let a request slip past a DENY).
///
/// # Errors
/// If the template has unbalanced braces or does not start with `/`.
pub fn template_regex(template: &str) -> Result<Regex, MatcherError> {
    let wrong = |reason| MatcherError::Template { template: template.to_owned(), reason };
    if !template.starts_with('/') {
        return Err(wrong("does not start with /"));
    }
    let mut out = String::new();
    let mut rest = template;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("**") {
            out.push_str(".*");
            rest = after;
        } else if c == '*' {
            out.push_str("[^/]+");
            rest = &rest[1..];
        } else if c == '{' {
            let (variable, after) = rest[1..].split_once('}').ok_or_else(|| wrong("a brace is not closed"))?;
            let (name, pattern) = variable.split_once('=').unwrap_or((variable, "*"));
            if name.contains('{') || pattern.contains('{') {
                return Err(wrong("braces are nested"));
            }
            // Istio's own `{*}` and `{**}` name no variable.
            let pattern = if name.starts_with('*') { name } else { pattern };
            out.push('(');
            for part in pattern.split_inclusive('/') {
                let (text, slash) = part.strip_suffix('/').map_or((part, ""), |text| (text, "/"));
                match text {
                    "**" => out.push_str(".*"),
                    "*" => out.push_str("[^/]+"),
                    text => out.push_str(&regex::escape(text)),
                }
                out.push_str(slash);
            }
            out.push(')');
            rest = after;
        } else if c == '}' {
            return Err(wrong("a brace is not opened"));
        } else {
            out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4])));
            rest = &rest[c.len_utf8()..];
        }
    }
    full_regex(&out)
}
