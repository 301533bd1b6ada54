//! Ends a DaemonSet and waits for its pods, which may have something to take back.
use std::time::Duration;

use compat_objects::k8s_openapi::api::apps::v1::DaemonSet;
use compat_objects::k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PropagationPolicy};
use kube::core::PartialObjectMeta;

use crate::access::ApiServer;

/// Between two looks at the pods.
const PAUSE: Duration = Duration::from_millis(500);

/// Why the DaemonSet's pods may still run.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    #[error("DaemonSet {namespace}/{name}: {what}: {source}")]
    ApiServer { namespace: String, name: String, what: &'static str, source: Box<kube::Error> },
    #[error("DaemonSet {namespace}/{name}: it selects no pods by labels")]
    NoSelector { namespace: String, name: String },
    #[error("DaemonSet {namespace}/{name}: after {seconds} s these pods still run: {pods}")]
    Late { namespace: String, name: String, seconds: u64, pods: String },
}

/// Deletes a DaemonSet and returns how many pods it had, when the last one has ended. One that is not there had none.
///
/// # Errors
/// What the API server refused, or the pods that have not ended `within` that time.
pub async fn remove_daemon_set(
    api: &ApiServer,
    namespace: &str,
    name: &str,
    within: Duration,
) -> Result<usize, RemovalError> {
    let failed = |what| {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        move |source| RemovalError::ApiServer { namespace, name, what, source: Box::new(source) }
    };
    let daemon_sets: Api<DaemonSet> = Api::namespaced(api.client.clone(), namespace);
    let Some(found) = daemon_sets.get_opt(name).await.map_err(failed("look up"))? else { return Ok(0) };
    let labels = found.spec.and_then(|spec| spec.selector.match_labels).unwrap_or_default();
    if labels.is_empty() {
        return Err(RemovalError::NoSelector { namespace: namespace.into(), name: name.into() });
    }
    let selector: Vec<String> = labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
    let pods = Pods {
        api: Api::namespaced(api.client.clone(), namespace),
        list: ListParams::default().labels(&selector.join(",")),
        owner: found.metadata.uid.unwrap_or_default(),
    };
    let before = pods.names().await.map_err(failed("list pods"))?.len();
    // In the background: the object is gone at once, which is how its pods know that they end for good.
    let params = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
    daemon_sets.delete(name, &params).await.map_err(failed("delete"))?;
    let end = tokio::time::Instant::now() + within;
    loop {
        let left = pods.names().await.map_err(failed("list pods"))?;
        if left.is_empty() {
            return Ok(before);
        }
        if tokio::time::Instant::now() >= end {
            let (namespace, name, seconds) = (namespace.into(), name.into(), within.as_secs());
            return Err(RemovalError::Late { namespace, name, seconds, pods: left.join(", ") });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The pods of one DaemonSet.
struct Pods {
    api: Api<Pod>,
    list: ListParams,
    owner: String,
}

impl Pods {
    async fn names(&self) -> Result<Vec<String>, kube::Error> {
        let found = self.api.list_metadata(&self.list).await?;
        let owned = |pod: &PartialObjectMeta<Pod>| {
            pod.metadata.owner_references.iter().flatten().any(|owner| owner.uid == self.owner)
        };
        Ok(found.items.into_iter().filter(owned).filter_map(|pod| pod.metadata.name).collect())
    }
}
