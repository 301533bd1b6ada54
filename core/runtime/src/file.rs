//! Files that others replace while we run: projected tokens, ConfigMaps mounted as volumes.
use std::path::Path;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

/// How often a file is looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Resolves with the file's content once it can be read, is not empty and differs from `seen`.
///
/// A file that vanishes or turns empty counts as not changed: whoever replaces it is in the middle of it. Looking
/// works for every way of mounting; the kubelet swaps symbolic links, which a watch of the file itself does not see.
pub async fn changed(path: &Path, seen: &[u8]) -> Vec<u8> {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match tokio::fs::read(path).await {
            Ok(now) if !now.is_empty() && now != seen => return now,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_new_content_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root-cert.pem");
        std::fs::write(&path, "old").unwrap();
        let watched = path.clone();
        let waiting = tokio::spawn(async move { changed(&watched, b"old").await });
        tokio::time::sleep(LOOK_EVERY * 3).await;
        std::fs::remove_file(&path).unwrap();
        tokio::time::sleep(LOOK_EVERY * 3).await;
        std::fs::write(&path, "").unwrap();
        tokio::time::sleep(LOOK_EVERY * 3).await;
        assert!(!waiting.is_finished());
        std::fs::write(&path, "new").unwrap();
        assert_eq!(waiting.await.unwrap(), b"new");
    }
}
