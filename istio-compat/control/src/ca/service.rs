//! `istio.v1.auth.IstioCertificateService`: who may have which identity (xds-contract section 3).
use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use xds_proto::istio::ca::istio_certificate_service_server::IstioCertificateService;
use xds_proto::istio::ca::{IstioCertificateRequest, IstioCertificateResponse};

use super::{CaError, Current, DEFAULT_TTL};
use crate::state::State;
use crate::tokens::Holder;

/// Signs for token holders.
pub(crate) struct CaService {
    pub(crate) authority: Current,
    pub(crate) state: Arc<State>,
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let holder = self.state.holder(request.metadata()).await?;
        let request = request.into_inner();
        let identity = self.identity(&holder, impersonated(&request)).inspect_err(|status| {
            tracing::warn!(?holder, reason = status.message(), "certificate refused");
        })?;
        let ttl = match u64::try_from(request.validity_duration) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => DEFAULT_TTL,
        };
        let authority = self.authority.borrow().clone();
        let leaf = authority.sign(&request.csr, &identity, ttl).map_err(|error| match error {
            CaError::Request(_) => Status::invalid_argument(error.to_string()),
            error => Status::internal(error.to_string()),
        })?;
        tracing::info!(%identity, "certificate issued");
        let above = authority.above().map(str::to_owned);
        Ok(Response::new(IstioCertificateResponse { cert_chain: std::iter::once(leaf).chain(above).collect() }))
    }
}

impl CaService {
    /// The identity to issue: the account's own, or one of a pod on the node.
    fn identity(&self, holder: &Holder, impersonated: Option<&str>) -> Result<String, Status> {
        let trust_domain = self.state.trust_domain();
        match (holder, impersonated) {
            (Holder::ServiceAccount { namespace, name }, None) => {
                Ok(format!("spiffe://{trust_domain}/ns/{namespace}/sa/{name}"))
            }
            (Holder::ServiceAccount { .. }, Some(_)) => {
                Err(Status::unauthenticated("a service account's token is for its own identity only"))
            }
            (Holder::Node(_), None) => {
                Err(Status::unauthenticated("a node's token needs metadata ImpersonatedIdentity"))
            }
            (Holder::Node(node), Some(identity)) => {
                let (namespace, account) = parse(identity, trust_domain)
                    .ok_or_else(|| Status::unauthenticated(format!("{identity} is no identity of {trust_domain}")))?;
                if self.state.runs_on(node, namespace, account) {
                    Ok(identity.to_owned())
                } else {
                    let reason = format!("no pod with service account {namespace}/{account} runs on node {node}");
                    Err(Status::unauthenticated(reason))
                }
            }
        }
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    let value = request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?;
    // prost-types' own enum: Struct values of the CA's message are not Envoy's copy.
    match value.kind.as_ref()? {
        prost_types::value::Kind::StringValue(text) if !text.is_empty() => Some(text),
        _ => None,
    }
}

/// Namespace and service account of `spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
fn parse<'a>(identity: &'a str, trust_domain: &str) -> Option<(&'a str, &'a str)> {
    let path = identity.strip_prefix("spiffe://")?.strip_prefix(trust_domain)?.strip_prefix("/ns/")?;
    let (namespace, account) = path.split_once("/sa/")?;
    let plain = |part: &str| !part.is_empty() && !part.contains('/');
    (plain(namespace) && plain(account)).then_some((namespace, account))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_identities_of_the_own_trust_domain_are_read() {
        assert_eq!(parse("spiffe://cluster.local/ns/a/sa/b", "cluster.local"), Some(("a", "b")));
        assert_eq!(parse("spiffe://cluster.local.evil/ns/a/sa/b", "cluster.local"), None);
        assert_eq!(parse("spiffe://other/ns/a/sa/b", "cluster.local"), None);
        assert_eq!(parse("spiffe://cluster.local/ns/a/sa/b/c", "cluster.local"), None);
        assert_eq!(parse("spiffe://cluster.local/ns//sa/b", "cluster.local"), None);
    }
}
