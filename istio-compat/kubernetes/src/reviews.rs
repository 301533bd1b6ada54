//! Whose a service account's token is, and what an account may do, as the API server says.
use std::time::Duration;

use compat_objects::k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use compat_objects::k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::{Api, PostParams};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::access::ApiServer;
use crate::backoff::told;

/// For one question. Whoever asks us has a timeout of its own.
const PATIENCE: Duration = Duration::from_secs(5);
const USER: &str = "system:serviceaccount:";
/// What the API server adds for a token bound to a pod (`ServiceAccountTokenPodNodeInfo` and before, KEP-4193).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Who holds a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reviewed {
    pub namespace: String,
    pub account: String,
    /// Name and uid of the pod the token was made for, if it was made for one.
    pub pod: Option<(String, String)>,
    /// The node of that pod (Kubernetes 1.32 and later say so).
    pub node: Option<String>,
}

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The token is no good, and will not be later.
    #[error("{0}")]
    Refused(String),
    /// Nobody knows now.
    #[error("the API server did not review the token: {0}")]
    Unknown(String),
}

/// Asks the API server (TokenReview of authentication.k8s.io/v1).
#[derive(Debug, Clone)]
pub struct TokenReviewer {
    api: ApiServer,
    audience: String,
}

impl TokenReviewer {
    /// Takes tokens made for `audience`, and no others.
    pub fn new(api: &ApiServer, audience: &str) -> TokenReviewer {
        TokenReviewer { api: api.clone(), audience: audience.to_owned() }
    }

    /// Whose the token is.
    ///
    /// # Errors
    /// If it is not one of a service account, is not for the audience, has expired, or cannot be reviewed now.
    pub async fn review(&self, token: &str) -> Result<Reviewed, ReviewError> {
        let audiences = Some(vec![self.audience.clone()]);
        let spec = TokenReviewSpec { token: token.to_owned(), audiences };
        let question = TokenReview { spec, ..TokenReview::default() };
        let answer = ask(&self.api, &question).await.map_err(ReviewError::Unknown)?;
        read(answer.status.unwrap_or_default(), &self.audience)
    }
}

/// Asks the API server (SubjectAccessReview of authorization.k8s.io/v1).
#[derive(Debug, Clone)]
pub struct AccessReviewer(ApiServer);

impl AccessReviewer {
    pub fn new(api: &ApiServer) -> AccessReviewer {
        AccessReviewer(api.clone())
    }

    /// Whether a service account may list the Secrets of its namespace.
    ///
    /// # Errors
    /// That nobody knows now, and why.
    pub async fn may_list_secrets(&self, namespace: &str, account: &str) -> Result<bool, String> {
        let wanted = ResourceAttributes {
            namespace: Some(namespace.to_owned()),
            verb: Some("list".to_owned()),
            resource: Some("secrets".to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SubjectAccessReviewSpec {
            user: Some(format!("{USER}{namespace}:{account}")),
            // What a token of the account would carry: roles may be bound to these.
            groups: Some(vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                "system:authenticated".to_owned(),
            ]),
            resource_attributes: Some(wanted),
            ..SubjectAccessReviewSpec::default()
        };
        let question = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        Ok(ask(&self.0, &question).await?.status.is_some_and(|status| status.allowed))
    }
}

/// The answer is the question with its status.
async fn ask<Q>(api: &ApiServer, question: &Q) -> Result<Q, String>
where
    Q: kube::Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    let (reviews, params) = (Api::<Q>::all(api.client.clone()), PostParams::default());
    let asked = tokio::time::timeout(PATIENCE, reviews.create(&params, question)).await;
    let answer = asked.map_err(|_| format!("no answer in {} s", PATIENCE.as_secs()))?;
    answer.map_err(|error| told(&error))
}

fn read(status: TokenReviewStatus, audience: &str) -> Result<Reviewed, ReviewError> {
    let refused = |reason: String| Err(ReviewError::Refused(reason));
    if status.authenticated != Some(true) {
        let reason = status.error.filter(|error| !error.is_empty());
        return refused(reason.unwrap_or_else(|| "the API server does not know the token".to_owned()));
    }
    // An API server that knows no audiences answers without any, and has not looked.
    if !status.audiences.unwrap_or_default().iter().any(|found| found == audience) {
        return refused(format!("the token is not for audience {audience}"));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.as_deref().unwrap_or_default();
    let Some((namespace, account)) = name.strip_prefix(USER).and_then(|rest| rest.split_once(':')) else {
        return refused(format!("{name:?} is no service account"));
    };
    let (namespace, account) = (namespace.to_owned(), account.to_owned());
    let pod = extra(&user, POD_NAME).zip(extra(&user, POD_UID));
    Ok(Reviewed { namespace, account, pod, node: extra(&user, NODE_NAME) })
}

fn extra(user: &UserInfo, key: &str) -> Option<String> {
    user.extra.as_ref()?.get(key)?.first().cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(user: &str, audiences: &[&str]) -> TokenReviewStatus {
        let user = UserInfo { username: Some(user.to_owned()), ..UserInfo::default() };
        let audiences = Some(audiences.iter().map(|audience| (*audience).to_owned()).collect());
        TokenReviewStatus { authenticated: Some(true), audiences, user: Some(user), error: None }
    }

    #[test]
    fn only_service_accounts_of_the_audience_are_taken() {
        let reviewed = read(status("system:serviceaccount:shop:cart", &["istio-ca"]), "istio-ca").unwrap();
        assert_eq!((reviewed.namespace.as_str(), reviewed.account.as_str()), ("shop", "cart"));
        assert_eq!((reviewed.pod, reviewed.node), (None, None));
        for (status, reason) in [
            (status("system:serviceaccount:shop:cart", &["api"]), "audience"),
            (status("system:serviceaccount:shop:cart", &[]), "audience"),
            (status("admin", &["istio-ca"]), "no service account"),
            (TokenReviewStatus::default(), "does not know"),
        ] {
            assert!(
                matches!(read(status, "istio-ca"), Err(ReviewError::Refused(why)) if why.contains(reason)),
                "{reason}"
            );
        }
    }
}
