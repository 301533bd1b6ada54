//! CNI ADDs that come before their pods: the runtime's call and the API server's news of a pod race each other.
//!
//! No pod starts outside policy and capture, so the call waits until the pod's object is known, for a while.
use std::time::{Duration, Instant};

use compat_objects::HasMeta as _;
use compat_objects::core::Pod;
use l4_cni::code;
use l4_cni::protocol::{Add, AttachmentId, Failure, Response};
use tokio::sync::oneshot;

use crate::agent::Agent;
use crate::objects;

/// How long an ADD waits for its pod's object.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A static pod has two uids: the runtime is told the file's, which its mirror object carries in these (kubelet).
const STATIC_UID: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// A waiting ADD.
#[derive(Debug)]
pub(crate) struct Arrival {
    add: Add,
    reply: oneshot::Sender<Response>,
    until: Instant,
}

impl Agent {
    /// Carries the ADD out, now or when its pod is known.
    pub(crate) async fn add_when_known(&mut self, add: Add, reply: oneshot::Sender<Response>) {
        self.forget_arrival(&add.attachment);
        if self.may_add(&add) {
            return self.answer_add(add, reply).await;
        }
        tracing::debug!(pod = %format_args!("{}/{}", add.pod.namespace, add.pod.name), "an ADD waits for its pod");
        self.arrivals.push(Arrival { add, reply, until: Instant::now() + TIMEOUT });
    }

    /// Looks at the waiting ADDs again.
    pub(crate) async fn retry_arrivals(&mut self) {
        let now = Instant::now();
        for arrival in std::mem::take(&mut self.arrivals) {
            if self.may_add(&arrival.add) {
                self.answer_add(arrival.add, arrival.reply).await;
            } else if arrival.until <= now {
                let failure = self.not_known(&arrival.add);
                tracing::warn!(attachment = %arrival.add.attachment, error = %failure, "CNI ADD failed");
                let _plugin = arrival.reply.send(Response::Failed(failure));
            } else {
                self.arrivals.push(arrival);
            }
        }
    }

    /// Ends the wait of an attachment: the runtime gave up, or asks anew.
    pub(crate) fn forget_arrival(&mut self, attachment: &AttachmentId) {
        let waiting = self.arrivals.iter().position(|arrival| arrival.add.attachment == *attachment);
        if let Some(waiting) = waiting {
            let failure = Failure::new(code::TRY_AGAIN_LATER, "another call for the same attachment came");
            let _plugin = self.arrivals.swap_remove(waiting).reply.send(Response::Failed(failure));
        }
    }

    fn may_add(&self, add: &Add) -> bool {
        if !self.waits_for_pods || self.pods.contains_key(&add.attachment) {
            return true;
        }
        let pod = objects::described(&self.objects, &self.node, &add.pod.namespace, &add.pod.name);
        pod.is_some_and(|pod| is_the_pod(pod, &add.pod.uid))
    }

    fn not_known(&self, add: &Add) -> Failure {
        let (namespace, name, uid) = (&add.pod.namespace, &add.pod.name, &add.pod.uid);
        let shown = self.objects.pod(namespace, name).and_then(|pod| pod.metadata.uid.as_deref());
        let reason = match (&self.problem, shown) {
            (Some(problem), _) => format!("pod {namespace}/{name}: {problem}"),
            (None, Some(shown)) => format!("the API server shows pod {namespace}/{name} with uid {shown}, not {uid}"),
            (None, None) => format!("the API server shows no pod {namespace}/{name} (uid {uid}) on this node"),
        };
        Failure::new(code::TRY_AGAIN_LATER, "the pod is not known yet").because(reason)
    }
}

/// Whether an object is the pod the runtime means. A runtime that does not say a uid means the name.
pub(crate) fn is_the_pod(pod: &Pod, uid: &str) -> bool {
    uid.is_empty()
        || pod.metadata.uid.as_deref() == Some(uid)
        || STATIC_UID.iter().any(|annotation| pod.annotation(annotation) == Some(uid))
}

#[cfg(test)]
mod tests {
    use compat_objects::core::ObjectMeta;

    use super::*;

    #[test]
    fn a_successor_of_the_same_name_is_another_pod() {
        let mirror = [("kubernetes.io/config.mirror".to_owned(), "file".to_owned())];
        let metadata = ObjectMeta {
            uid: Some("u1".into()),
            annotations: Some(mirror.into_iter().collect()),
            ..ObjectMeta::default()
        };
        let pod = Pod { metadata, ..Pod::default() };
        assert!(is_the_pod(&pod, "u1") && is_the_pod(&pod, "") && is_the_pod(&pod, "file"));
        assert!(!is_the_pod(&pod, "u2"));
    }
}
