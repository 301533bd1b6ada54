//! Matchers shared by routes, authorization, JWT and external authorization: plain, not yet compiled.
use serde::Serialize;

/// How a string is compared (`envoy.type.matcher.v3.StringMatcher`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StringMatcher {
    pub pattern: StringPattern,
    /// ASCII case is ignored; never set together with a regex.
    pub ignore_case: bool,
}

/// The pattern of a [`StringMatcher`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum StringPattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
    /// RE2 text, matched against the whole string.
    Regex(String),
}

impl StringMatcher {
    /// A case-sensitive exact matcher.
    pub fn exact(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Exact(value.into()), ignore_case: false }
    }
}

/// A test on one request header or pseudo-header (`:method`, `:authority`, `:scheme`, `:path`).
/// Several values of one header are joined with `,` before the test, as Envoy does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeaderMatcher {
    /// Lower case.
    pub name: String,
    pub test: HeaderTest,
    /// The outcome is negated. A missing header never matches a value test, and so with `invert`
    /// a missing header matches only under `missing_as_empty` or [`HeaderTest::Present`]; see `l7-authz`.
    pub invert: bool,
    pub missing_as_empty: bool,
}

/// What a [`HeaderMatcher`] asks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum HeaderTest {
    /// `true`: must be there; `false`: must not.
    Present(bool),
    Value(StringMatcher),
    /// Integer value in `start..end`.
    Range {
        start: i64,
        end: i64,
    },
}

/// A test on one query parameter; the first occurrence counts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryMatcher {
    pub name: String,
    pub test: QueryTest,
}

/// What a [`QueryMatcher`] asks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum QueryTest {
    Present(bool),
    Value(StringMatcher),
}

/// A test on a JSON-like value (`envoy.type.matcher.v3.ValueMatcher`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ValueMatcher {
    Null,
    /// Exact number.
    Number(f64),
    /// `start <= n < end`.
    NumberRange {
        start: f64,
        end: f64,
    },
    String(StringMatcher),
    Bool(bool),
    /// `true`: there, even if null. `false`: not there.
    Present(bool),
    /// One element of a list matches.
    List(Box<ValueMatcher>),
    Or(Vec<ValueMatcher>),
}

/// A test on dynamic metadata. Strata serves the namespace `envoy.filters.http.jwt_authn`, whose first
/// path element is the provider's `payload_in_metadata` name, the rest a path into the claims.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetadataMatcher {
    /// Metadata namespace, i.e. the filter that wrote it.
    pub filter: String,
    pub path: Vec<String>,
    pub value: ValueMatcher,
    pub invert: bool,
}

/// How a request's path is matched. The query string is never part of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum PathMatcher {
    Prefix(String),
    Exact(String),
    /// `/a` matches `/a` and `/a/...`, not `/ab`.
    SeparatedPrefix(String),
    /// RE2 text, matched against the whole path.
    Regex(String),
    /// `envoy.path.match.uri_template`: `*` one segment, `**` any rest, `{name}` captures.
    UriTemplate(String),
    /// A CONNECT request.
    Connect,
}

/// `numerator` out of `denominator` (100, 10 000 or 1 000 000) requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fraction {
    pub numerator: u32,
    pub denominator: u32,
}

impl Fraction {
    pub const ALWAYS: Self = Self { numerator: 100, denominator: 100 };
    pub const NEVER: Self = Self { numerator: 0, denominator: 100 };

    /// Whether a draw (any uniformly distributed number) falls into the fraction.
    pub fn hit(self, draw: u64) -> bool {
        draw % u64::from(self.denominator.max(1)) < u64::from(self.numerator)
    }
}
