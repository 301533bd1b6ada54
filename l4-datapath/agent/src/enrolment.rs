//! How a pod comes into the mesh and leaves it: a pure state machine; the agent carries the steps out.
//!
//! Order of enrolling: announce to the proxy, its listeners, rules in the pod, sk_lookup, flag; leaving is the reverse.
//! While a proxy is away nothing changes: a captured pod stays captured (its traffic fails closed), a waiting one waits.

/// Where a pod stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Phase {
    /// Not in the mesh, or no proxy is there to announce it to.
    #[default]
    Out,
    /// Announced to the proxy; its listeners are awaited.
    Announced,
    /// Capture is in force. `announced`: to the proxy that is connected now.
    Enrolled { announced: bool },
    /// The proxy or the kernel refused; tried again when the proxy reconnects or the pod's object changes.
    Failed { reason: String },
}

/// What happens to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The objects say whether it belongs into the mesh.
    Wanted(bool),
    ProxyConnected,
    ProxyGone,
    /// The proxy listens inside the pod.
    Listeners,
    /// The proxy cannot listen inside the pod, or the kernel refused a step.
    Failed(String),
    /// All steps of [`Step::Capture`] are done.
    Captured,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send `PodAdded` with the namespace.
    Announce,
    /// Listeners into the map, rules, sk_lookup, flag, status; then [`Event::Captured`].
    Capture,
    /// Flag, sk_lookup, listeners out, status; rules after the connections have drained.
    Release,
    /// Send `PodRemoved`.
    Withdraw,
}

impl Phase {
    pub(crate) fn is_enrolled(&self) -> bool {
        matches!(self, Phase::Enrolled { .. })
    }

    /// A word for users.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Phase::Out => "out",
            Phase::Announced => "waiting for the proxy",
            Phase::Enrolled { .. } => "enrolled",
            Phase::Failed { .. } => "failed",
        }
    }

    /// The next phase and what to do on the way. `wanted`: the objects want the pod in the mesh; `proxy`: one is
    /// connected.
    pub(crate) fn next(&self, event: Event, wanted: bool, proxy: bool) -> (Phase, &'static [Step]) {
        use Phase::{Announced, Enrolled, Failed, Out};
        match (self, event) {
            (Out | Failed { .. }, Event::Wanted(true) | Event::ProxyConnected) if wanted && proxy => {
                (Announced, &[Step::Announce])
            }
            (Failed { .. }, Event::Wanted(false)) => (Out, &[]),
            (Announced, Event::Wanted(false)) => (Out, &[Step::Withdraw]),
            (Announced, Event::ProxyConnected) => (Announced, &[Step::Announce]),
            (Announced, Event::ProxyGone) => (Out, &[]),
            (Announced, Event::Listeners) => (Announced, &[Step::Capture]),
            (Announced, Event::Captured) => (Enrolled { announced: true }, &[]),
            (Announced, Event::Failed(reason)) => (Failed { reason }, &[Step::Release, Step::Withdraw]),
            (Enrolled { announced: true }, Event::Wanted(false)) => (Out, &[Step::Release, Step::Withdraw]),
            (Enrolled { announced: false }, Event::Wanted(false)) => (Out, &[Step::Release]),
            (Enrolled { announced: false }, Event::Wanted(true)) if proxy => {
                (Enrolled { announced: true }, &[Step::Announce])
            }
            (Enrolled { .. }, Event::ProxyConnected) => (Enrolled { announced: true }, &[Step::Announce]),
            (Enrolled { .. }, Event::ProxyGone) => (Enrolled { announced: false }, &[]),
            // A new proxy's listeners replace the old one's, capture goes on.
            (Enrolled { announced: true }, Event::Listeners) => (self.clone(), &[Step::Capture]),
            // The new proxy cannot listen: what the old one has stays, and fails closed when it is gone.
            (Enrolled { .. }, Event::Failed(_)) => (self.clone(), &[]),
            _ => (self.clone(), &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn walk(events: &[(Event, bool, bool)]) -> (Phase, Vec<Step>) {
        let mut phase = Phase::default();
        let mut steps = Vec::new();
        for (event, wanted, proxy) in events {
            let (next, todo) = phase.next(event.clone(), *wanted, *proxy);
            phase = next;
            steps.extend(todo);
        }
        (phase, steps)
    }

    #[test]
    fn a_pod_is_captured_after_the_proxy_listens() {
        let (phase, steps) = walk(&[
            (Event::Wanted(true), true, false),
            (Event::ProxyConnected, true, true),
            (Event::Listeners, true, true),
            (Event::Captured, true, true),
        ]);
        assert_eq!(phase, Phase::Enrolled { announced: true });
        assert_eq!(steps, [Step::Announce, Step::Capture]);
    }

    #[test]
    fn leaving_is_the_reverse() {
        let enrolled = Phase::Enrolled { announced: true };
        assert_eq!(
            enrolled.next(Event::Wanted(false), false, true),
            (Phase::Out, &[Step::Release, Step::Withdraw][..])
        );
    }

    #[test]
    fn a_proxy_that_goes_and_comes_disturbs_nothing() {
        let enrolled = Phase::Enrolled { announced: true };
        let (away, steps) = enrolled.next(Event::ProxyGone, true, false);
        assert_eq!((&away, steps), (&Phase::Enrolled { announced: false }, &[][..]));
        let (back, steps) = away.next(Event::ProxyConnected, true, true);
        assert_eq!((&back, steps), (&enrolled, &[Step::Announce][..]));
        assert_eq!(back.next(Event::Listeners, true, true), (enrolled, &[Step::Capture][..]));
    }

    #[test]
    fn a_failure_is_told_and_tried_again() {
        let (failed, steps) = Phase::Announced.next(Event::Failed("no".into()), true, true);
        assert_eq!((&failed, steps), (&Phase::Failed { reason: "no".into() }, &[Step::Release, Step::Withdraw][..]));
        assert_eq!(failed.next(Event::ProxyConnected, true, true), (Phase::Announced, &[Step::Announce][..]));
        // A proxy that refuses to replace listeners takes nobody out of the mesh.
        let enrolled = Phase::Enrolled { announced: true };
        assert_eq!(enrolled.next(Event::Failed("no".into()), true, true), (enrolled.clone(), &[][..]));
    }

    fn events() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(0u8..7, 1..60)
    }

    proptest! {
        /// Whatever happens: capture is released exactly when it was in force or half made, and never for a pod that
        /// is wanted and working.
        #[test]
        fn captured_pods_leave_only_when_unwanted(script in events()) {
            let (mut phase, mut wanted, mut proxy) = (Phase::default(), false, false);
            for step in script {
                let event = match step {
                    0 => { wanted = true; Event::Wanted(true) }
                    1 => { wanted = false; Event::Wanted(false) }
                    2 => { proxy = true; Event::ProxyConnected }
                    3 => { proxy = false; Event::ProxyGone }
                    4 => Event::Listeners,
                    5 => Event::Failed("x".into()),
                    _ => Event::Captured,
                };
                let before = phase.clone();
                let (next, steps) = phase.next(event, wanted, proxy);
                if before.is_enrolled() && !next.is_enrolled() {
                    prop_assert!(!wanted && steps.contains(&Step::Release));
                }
                if next == Phase::Announced {
                    prop_assert!(wanted && proxy);
                }
                if next.is_enrolled() && !before.is_enrolled() {
                    prop_assert_eq!(before, Phase::Announced);
                }
                phase = next;
            }
        }
    }
}
