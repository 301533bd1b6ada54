//! Keeps the table as it was last asked for. A task of its own: `nft` takes a second for thousands of ports and may hang, and pods that
//! start, policies and enrolment do not wait for that.
use std::sync::Arc;
use std::time::Duration;

use l4_edge::Edge;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How often somebody may have taken the table away.
const LOOK: Duration = Duration::from_secs(60);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(5);

/// What has become of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// Entries of the table in force.
    pub(super) published: usize,
    /// Why it is not the one that was asked for.
    pub(super) problem: Option<String>,
}

#[derive(Debug)]
pub(super) struct Keeper {
    asked: watch::Sender<Arc<Edge>>,
    outcome: watch::Receiver<Outcome>,
    task: JoinHandle<()>,
}

impl Keeper {
    pub(super) fn start(edge: Arc<Edge>) -> Keeper {
        let (asked, asking) = watch::channel(edge);
        let (told, outcome) = watch::channel(Outcome::default());
        Keeper { asked, outcome, task: tokio::spawn(keep(asking, told)) }
    }

    pub(super) fn ask(&self, edge: Arc<Edge>) {
        self.asked.send_replace(edge);
    }

    pub(super) fn outcome(&self) -> Outcome {
        self.outcome.borrow().clone()
    }

    /// The table stays as it is from then on.
    pub(super) async fn end(self) {
        // Told by the sender's end, not cut: `nft` may be at work.
        drop(self.asked);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the keeper of the table inet strata ended");
        }
    }
}

async fn keep(mut asked: watch::Receiver<Arc<Edge>>, told: watch::Sender<Outcome>) {
    let mut in_force = None;
    loop {
        let edge = asked.borrow_and_update().clone();
        let problem = bring(&edge, &mut in_force).await.err().map(|error| error.to_string());
        let before = told.borrow().problem.clone();
        if let Some(problem) = problem.as_ref().filter(|problem| before.as_ref() != Some(problem)) {
            tracing::error!(problem, "callers outside the cluster, and pods that call there, are served as before");
        }
        let rest = if problem.is_some() { AGAIN } else { LOOK };
        let published = in_force.as_ref().map_or(0, |edge| edge.published.len());
        told.send_replace(Outcome { published, problem });
        tokio::select! {
            changed = asked.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(rest) => {}
        }
    }
}

/// Writes the table, unless it is there as asked for.
async fn bring(asked: &Arc<Edge>, in_force: &mut Option<Arc<Edge>>) -> Result<(), l4_edge::Error> {
    if in_force.as_ref() == Some(asked) {
        if l4_edge::is_there().await? {
            return Ok(());
        }
        tracing::warn!("the table inet strata was gone, it is made anew");
    }
    l4_edge::apply(&asked.ruleset()).await?;
    *in_force = Some(asked.clone());
    Ok(())
}

/// An earlier agent was told otherwise: its table goes.
pub(super) async fn remove_leftover() {
    if !l4_edge::is_there().await.unwrap_or(false) {
        return;
    }
    match l4_edge::remove().await {
        Ok(()) => tracing::info!("the table inet strata is gone: nothing is wanted of it any more"),
        Err(error) => tracing::error!(%error, "the table inet strata could not be removed"),
    }
}
