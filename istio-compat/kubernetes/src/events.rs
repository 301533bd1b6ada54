//! Kubernetes Events: what goes wrong with an object is told on the object.
use std::collections::HashMap;
use std::time::Duration;

use compat_objects::core::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use strata_runtime::task;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::backoff::{Backoff, chain};

/// Events that wait to be sent; more are dropped and logged.
const QUEUE: usize = 256;
/// The same is told again after this time at the earliest.
const TOLD_FOR: Duration = Duration::from_secs(600);
/// Attempts for one event.
const ATTEMPTS: usize = 4;
/// Longest note in bytes (events.k8s.io/v1).
const LONGEST: usize = 1000;

/// The object an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct About {
    pub api_version: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Note {
    /// One word in upper camel case.
    pub reason: &'static str,
    /// What was attempted, one word in upper camel case.
    pub action: &'static str,
    /// A sentence.
    pub text: String,
    pub warning: bool,
}

/// Sends events in the background.
#[derive(Debug, Clone)]
pub struct EventWriter {
    queue: mpsc::Sender<(About, Note)>,
}

impl EventWriter {
    /// Starts its task, inside a tokio runtime; it ends when every clone is dropped. `component` and `instance` say
    /// who tells, `strata-agent` and the node's name.
    pub fn start(api: &ApiServer, component: &str, instance: &str) -> EventWriter {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let reporter = Reporter { controller: format!("strata.io/{component}"), instance: Some(instance.to_owned()) };
        task::spawn("event-writer", run(Recorder::new(api.client.clone(), reporter), waiting));
        EventWriter { queue }
    }

    /// Tells something of an object, unless the same was told in the last ten minutes.
    pub fn tell(&self, about: About, note: Note) {
        if let Err(error) = self.queue.try_send((about, note)) {
            tracing::warn!(%error, "an event was dropped");
        }
    }
}

async fn run(recorder: Recorder, mut waiting: mpsc::Receiver<(About, Note)>) {
    let mut told: HashMap<(About, Note), Instant> = HashMap::new();
    while let Some((about, note)) = waiting.recv().await {
        let now = Instant::now();
        told.retain(|_, at| now.duration_since(*at) < TOLD_FOR);
        if told.contains_key(&(about.clone(), note.clone())) {
            continue;
        }
        if publish(&recorder, &about, &note).await {
            told.insert((about, note), now);
        }
    }
}

/// Tries a few times. False if it did not come through.
async fn publish(recorder: &Recorder, about: &About, note: &Note) -> bool {
    let object = ObjectReference {
        api_version: Some(about.api_version.clone()),
        kind: Some(about.kind.clone()),
        namespace: Some(about.namespace.clone()).filter(|namespace| !namespace.is_empty()),
        name: Some(about.name.clone()),
        uid: Some(about.uid.clone()).filter(|uid| !uid.is_empty()),
        ..ObjectReference::default()
    };
    let event = Event {
        type_: if note.warning { EventType::Warning } else { EventType::Normal },
        reason: note.reason.to_owned(),
        note: Some(shortened(&note.text)),
        action: note.action.to_owned(),
        secondary: None,
    };
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
    for attempt in 1..=ATTEMPTS {
        let Err(error) = recorder.publish(&event, &object).await else { return true };
        let (kind, name, error) = (&about.kind, &about.name, chain(&error));
        if attempt == ATTEMPTS {
            tracing::warn!(kind, name, reason = note.reason, error, "an event could not be written");
        } else {
            tokio::time::sleep(backoff.pause()).await;
        }
    }
    false
}

fn shortened(text: &str) -> String {
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let end = (0..=LONGEST - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_notes_are_cut_between_characters() {
        let text = "ä".repeat(600);
        let cut = shortened(&text);
        assert!(cut.len() <= LONGEST && cut.ends_with("ä..."), "{}", cut.len());
        assert_eq!(shortened("short"), "short");
    }
}
