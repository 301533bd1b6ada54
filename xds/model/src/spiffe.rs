//! SPIFFE identities in Istio's form: `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID specification section 2.4.
const MAX_URI: usize = 2048;
/// SPIFFE-ID specification section 2.1.
const MAX_TRUST_DOMAIN: usize = 255;

/// A workload's cryptographic identity. Cheap to clone; equality is byte equality of the URI.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    // Ends of the trust domain and of the namespace inside `uri`; they follow from it.
    trust_domain_end: u16,
    namespace_end: u16,
}

/// Why a string is not an identity of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    #[error("\"{0}\" does not start with spiffe://")]
    Scheme(String),
    #[error("\"{0}\" is longer than 2048 bytes or its trust domain is longer than 255")]
    TooLong(String),
    #[error("\"{0}\": the trust domain must be lower-case letters, digits, '.', '-', '_'")]
    TrustDomain(String),
    #[error("\"{0}\" is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")]
    Path(String),
}

impl SpiffeId {
    /// Builds an identity from its parts.
    ///
    /// # Errors
    /// If a part is empty or holds a character SPIFFE does not allow there.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<SpiffeId, SpiffeError> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The URI without its scheme: the form policies write principals in.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[usize::from(self.trust_domain_end) + "/ns/".len()..usize::from(self.namespace_end)]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + "/sa/".len()..]
    }

    /// The URI, shared: for labels and logs that outlive the identity.
    pub fn shared(&self) -> Arc<str> {
        self.uri.clone()
    }
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<SpiffeId, SpiffeError> {
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| SpiffeError::Scheme(text.to_owned()))?;
        if text.len() > MAX_URI {
            return Err(SpiffeError::TooLong(text.to_owned()));
        }
        let mut parts = rest.split('/');
        let trust_domain = parts.next().unwrap_or_default();
        if trust_domain.len() > MAX_TRUST_DOMAIN {
            return Err(SpiffeError::TooLong(text.to_owned()));
        }
        if !is_segment(trust_domain) || trust_domain.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(SpiffeError::TrustDomain(text.to_owned()));
        }
        let (Some("ns"), Some(namespace), Some("sa"), Some(account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(SpiffeError::Path(text.to_owned()));
        };
        if !is_segment(namespace) || !is_segment(account) {
            return Err(SpiffeError::Path(text.to_owned()));
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        // Both are below MAX_URI, checked above.
        Ok(SpiffeId {
            uri: text.into(),
            trust_domain_end: trust_domain_end as u16,
            namespace_end: namespace_end as u16,
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl serde::Serialize for SpiffeId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/checkout".parse().unwrap();
        assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), ("cluster.local", "shop", "checkout"));
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/checkout");
        assert_eq!(id, SpiffeId::new("cluster.local", "shop", "checkout").unwrap());
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/checkout");
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "",
            "cluster.local/ns/a/sa/b",
            "http://cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/sa/a/ns/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a/sa/b?q",
            "spiffe://td/ns/a%2f/sa/b",
            "spiffe://td:8080/ns/a/sa/b",
            "spiffe://user@td/ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
        assert!(format!("spiffe://{}/ns/a/sa/b", "t".repeat(256)).parse::<SpiffeId>().is_err());
    }
}
