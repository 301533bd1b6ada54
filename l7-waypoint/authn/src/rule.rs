//! Which requests a JWT rule is for. Istio writes one rule for every path; the other matches are served as well,
//! and one that is not understood is an error, so that a requirement is never skipped by mistake.

use regex::Regex;
use xds_model::envoy::jwt::JwtRuleMatch;
use xds_model::envoy::matcher::{HeaderTest, PathMatcher, QueryTest, StringMatcher, StringPattern};

use crate::requirement::{CompileError, Request};

#[derive(Debug)]
pub(crate) struct RuleMatch {
    path: Path,
    case_sensitive: bool,
    config: JwtRuleMatch,
}

#[derive(Debug)]
enum Path {
    Prefix(String),
    Exact(String),
    Separated(String),
    Regex(Regex),
}

impl RuleMatch {
    /// # Errors
    /// For a kind of match that is not served: guessing could skip a rule, or let an earlier one swallow the request.
    pub(crate) fn compile(config: &JwtRuleMatch) -> Result<Self, CompileError> {
        if !headers_served(config) || !query_served(config) {
            return Err(not_served());
        }
        let fold = |text: &str| if config.case_sensitive { text.to_owned() } else { text.to_ascii_lowercase() };
        let path = match &config.path {
            PathMatcher::Prefix(text) => Path::Prefix(fold(text)),
            PathMatcher::Exact(text) => Path::Exact(fold(text)),
            PathMatcher::SeparatedPrefix(text) => Path::Separated(fold(text)),
            PathMatcher::Regex(text) => Path::Regex(
                Regex::new(&format!("^(?:{text})$"))
                    .map_err(|error| CompileError::new("rules", "safe_regex", text, error))?,
            ),
            PathMatcher::UriTemplate(_) | PathMatcher::Connect => return Err(not_served()),
        };
        Ok(Self { path, case_sensitive: config.case_sensitive, config: config.clone() })
    }

    pub(crate) fn matches(&self, request: &Request<'_>) -> bool {
        let (path, query) = request.path_and_query.split_once('?').unwrap_or((request.path_and_query, ""));
        self.path_matches(path) && self.headers_match(request) && self.query_matches(query)
    }

    fn path_matches(&self, path: &str) -> bool {
        let folded = if self.case_sensitive { None } else { Some(path.to_ascii_lowercase()) };
        let folded = folded.as_deref().unwrap_or(path);
        match &self.path {
            Path::Prefix(prefix) => folded.starts_with(prefix.as_str()),
            Path::Exact(exact) => folded == exact,
            Path::Separated(prefix) => {
                folded.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Path::Regex(regex) => regex.is_match(path),
        }
    }

    fn headers_match(&self, request: &Request<'_>) -> bool {
        self.config.headers.iter().all(|header| {
            let value = match header.name.as_str() {
                ":method" => Some(request.method.as_str()),
                name => request.headers.get(name).and_then(|value| value.to_str().ok()),
            };
            let value = value.or(header.missing_as_empty.then_some(""));
            let matched = match &header.test {
                HeaderTest::Present(wanted) => value.is_some() == *wanted,
                HeaderTest::Value(matcher) => value.is_some_and(|value| text_matches(matcher, value)),
                HeaderTest::Range { start, end } => value
                    .and_then(|value| value.parse::<i64>().ok())
                    .is_some_and(|value| (*start..*end).contains(&value)),
            };
            matched != header.invert
        })
    }

    fn query_matches(&self, query: &str) -> bool {
        self.config.query.iter().all(|wanted| {
            let pair = query
                .split('&')
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .find(|(name, _)| *name == wanted.name);
            match &wanted.test {
                QueryTest::Present(present) => pair.is_some() == *present,
                QueryTest::Value(matcher) => pair.is_some_and(|(_, value)| text_matches(matcher, value)),
            }
        })
    }
}

fn not_served() -> CompileError {
    CompileError::new("rules", "match", "", "this kind of match is not served")
}

fn is_regex(matcher: &StringMatcher) -> bool {
    matches!(matcher.pattern, StringPattern::Regex(_))
}

fn headers_served(config: &JwtRuleMatch) -> bool {
    config.headers.iter().all(|header| {
        let known = !header.name.starts_with(':') || header.name == ":method";
        known && !matches!(&header.test, HeaderTest::Value(matcher) if is_regex(matcher))
    })
}

fn query_served(config: &JwtRuleMatch) -> bool {
    !config.query.iter().any(|wanted| matches!(&wanted.test, QueryTest::Value(matcher) if is_regex(matcher)))
}

fn text_matches(matcher: &StringMatcher, value: &str) -> bool {
    let fold = |text: &str| if matcher.ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
    let value = fold(value);
    match &matcher.pattern {
        StringPattern::Exact(text) => value == fold(text),
        StringPattern::Prefix(text) => value.starts_with(&fold(text)),
        StringPattern::Suffix(text) => value.ends_with(&fold(text)),
        StringPattern::Contains(text) => value.contains(&fold(text)),
        // Refused when compiled.
        StringPattern::Regex(_) => false,
    }
}
