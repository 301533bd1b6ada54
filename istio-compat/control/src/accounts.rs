//! Whose a bearer token is: of those this process wrote, or of Kubernetes' own.
use compat_kubernetes::{AccessReviewer, ReviewError, Reviewed, TokenReviewer};
use compat_objects::ObjectSet;
use tonic::Status;

use crate::tokens::{Holder, Tokens};

/// Who vouches for tokens.
pub(crate) enum Accounts {
    /// Files of this process's own.
    Files(Tokens),
    /// The API server.
    Cluster(Box<ClusterAccounts>),
}

/// Service accounts' tokens.
pub(crate) struct ClusterAccounts {
    pub(crate) reviewer: TokenReviewer,
    pub(crate) access: AccessReviewer,
    /// Namespace and name of the account whose pods are node proxies: each stands for its node.
    pub(crate) node_proxy: (String, String),
}

impl Accounts {
    /// Whose `token` is, at a time when `objects` are there.
    ///
    /// # Errors
    /// `Unauthenticated` for a token that is not in force, `Unavailable` if that cannot be found out now.
    pub(crate) async fn holder(&self, token: &str, objects: &ObjectSet) -> Result<Holder, Status> {
        match self {
            Accounts::Files(tokens) => {
                tokens.holder(token).ok_or_else(|| Status::unauthenticated("unknown bearer token"))
            }
            Accounts::Cluster(accounts) => {
                let reviewed = accounts.reviewer.review(token).await.map_err(|error| match error {
                    ReviewError::Refused(_) => Status::unauthenticated(error.to_string()),
                    ReviewError::Unknown(_) => Status::unavailable(error.to_string()),
                })?;
                accounts.holder(reviewed, objects)
            }
        }
    }
}

impl ClusterAccounts {
    fn holder(&self, reviewed: Reviewed, objects: &ObjectSet) -> Result<Holder, Status> {
        let Reviewed { namespace, account, pod, node } = reviewed;
        if (&namespace, &account) != (&self.node_proxy.0, &self.node_proxy.1) {
            return Ok(Holder::ServiceAccount { namespace, name: account });
        }
        let Some((name, uid)) = pod else {
            let reason = format!("the token of {namespace}/{account} is bound to no pod, so it stands for no node");
            return Err(Status::unauthenticated(reason));
        };
        let shown = objects.pod(&namespace, &name).filter(|pod| pod.metadata.uid.as_deref() == Some(&uid));
        let of_pod = shown.and_then(|pod| pod.spec.as_ref()?.node_name.clone());
        let unseen = || Status::unavailable(format!("the node of pod {namespace}/{name} is not known yet"));
        node.or(of_pod).map(Holder::Node).ok_or_else(unseen)
    }
}

#[cfg(test)]
mod tests {
    use compat_kubernetes::{Access, ApiServer};
    use compat_objects::Object;
    use compat_objects::core::{ObjectMeta, Pod, PodSpec};
    use tonic::Code;

    use super::*;

    fn reviewed(account: &str, uid: Option<&str>, node: Option<&str>) -> Reviewed {
        Reviewed {
            namespace: "istio-system".to_owned(),
            account: account.to_owned(),
            pod: uid.map(|uid| ("ztunnel-1".to_owned(), uid.to_owned())),
            node: node.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn the_node_proxys_token_stands_for_the_node_of_its_pod() {
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(
            &kubeconfig,
            "{current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}], \
             clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]}",
        )
        .unwrap();
        let api = ApiServer::connect(&Access::Kubeconfig(kubeconfig)).await.unwrap();
        let node_proxy = ("istio-system".to_owned(), "ztunnel".to_owned());
        let (reviewer, access) = (TokenReviewer::new(&api, "istio-ca"), AccessReviewer::new(&api));
        let accounts = ClusterAccounts { reviewer, access, node_proxy };
        let meta = ObjectMeta {
            namespace: Some("istio-system".into()),
            name: Some("ztunnel-1".into()),
            uid: Some("1".into()),
            ..ObjectMeta::default()
        };
        let spec = PodSpec { node_name: Some("node-a".into()), ..PodSpec::default() };
        let pod = Pod { metadata: meta, spec: Some(spec), ..Pod::default() };
        let objects: ObjectSet = [Object::from(pod)].into_iter().collect();

        let node = |name: &str| Some(Holder::Node(name.to_owned()));
        let holder = |reviewed| accounts.holder(reviewed, &objects);
        assert_eq!(holder(reviewed("ztunnel", Some("1"), None)).ok(), node("node-a"));
        assert_eq!(holder(reviewed("ztunnel", Some("2"), Some("node-b"))).ok(), node("node-b"));
        // A namesake's token says nothing of this pod, and one for no pod nothing at all.
        assert_eq!(holder(reviewed("ztunnel", Some("2"), None)).unwrap_err().code(), Code::Unavailable);
        assert_eq!(holder(reviewed("ztunnel", None, None)).unwrap_err().code(), Code::Unauthenticated);
        let other = Holder::ServiceAccount { namespace: "istio-system".into(), name: "waypoint".into() };
        assert_eq!(holder(reviewed("waypoint", Some("1"), None)).ok(), Some(other));
        // Nobody answers: that is no refusal.
        let unknown = Accounts::Cluster(Box::new(accounts)).holder("token", &objects).await.unwrap_err();
        assert_eq!(unknown.code(), Code::Unavailable);
    }
}
