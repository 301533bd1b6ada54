//! Brings a table into the kernel, by the program `nft`.
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::ruleset::TABLE;

/// How long `nft` may take; thousands of services take it about a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why the table is not as it should be; the one before stays whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the program nft (Debian: nftables) cannot be run: {0}")]
    Program(std::io::Error),
    #[error("nft did not end within {PATIENCE:?}")]
    Patience,
    #[error("nft: {0}")]
    Refused(String),
}

/// Puts a ruleset in force, all at once.
///
/// # Errors
/// If `nft` is not there or refuses; nothing has changed then.
pub async fn apply(ruleset: &str) -> Result<(), Error> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::Program)?;
    let mut stdin = child.stdin.take().ok_or_else(|| Error::Refused("no standard input".to_owned()))?;
    let talk = async {
        // If it ends before it has read all, its own words say why.
        let _written = stdin.write_all(ruleset.as_bytes()).await;
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(PATIENCE, talk).await.map_err(|_| Error::Patience)?.map_err(Error::Program)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Refused(said.lines().next().unwrap_or("no reason given").to_owned()))
}

/// Whether the table is there.
///
/// # Errors
/// If `nft` cannot be run.
pub async fn is_there() -> Result<bool, Error> {
    let output = Command::new("nft").args(["list", "tables", "inet"]).output().await.map_err(Error::Program)?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().any(|line| line.trim() == format!("table inet {TABLE}")))
}

/// Takes the table away; none there is no error.
///
/// # Errors
/// As [`apply`].
pub async fn remove() -> Result<(), Error> {
    apply(&format!("table inet {TABLE}\ndelete table inet {TABLE}\n")).await
}
