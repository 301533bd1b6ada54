//! One connection kept open while things change around it.
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::failure;
use crate::serve::duration;

/// How long to hold, how often to talk.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// ADDRESS:PORT of `strata-echo serve --tcp`
    #[arg(value_parser = crate::target)]
    target: SocketAddr,
    #[arg(long, value_parser = |text: &str| duration(text).ok_or("not a time"), default_value = "50ms")]
    every: Duration,
    /// End after this time; SIGTERM ends it too
    #[arg(long, value_parser = |text: &str| duration(text).ok_or("not a time"), default_value = "60s")]
    duration: Duration,
    /// An answer that takes longer counts as an interruption and ends the connection
    #[arg(long, value_parser = |text: &str| duration(text).ok_or("not a time"), default_value = "3s")]
    patience: Duration,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    /// Lines that came back.
    answered: u64,
    interrupted: bool,
    /// Symbolic errno, `closed by peer` or `timeout`.
    error: Option<String>,
    /// Since the connection was open: the last line that came back, and the end.
    last_answer_ms: f64,
    ended_ms: f64,
    longest_wait_ms: f64,
    peer: Option<String>,
    local: Option<String>,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let mut report = Report::default();
    match TcpStream::connect(args.target).await {
        Ok(stream) => talk(&args, stream, &mut report).await?,
        Err(error) => {
            report.interrupted = true;
            report.error = Some(format!("connect: {}", failure::name(&error)));
        }
    }
    crate::print(&report)
}

async fn talk(args: &Args, stream: TcpStream, report: &mut Report) -> anyhow::Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    stream.set_nodelay(true)?;
    report.peer = Some(stream.peer_addr()?.to_string());
    report.local = Some(stream.local_addr()?.to_string());
    let mut stream = BufReader::new(stream);
    // Whoever started us may wait for this line.
    eprintln!("open");
    let began = Instant::now();
    let mut line = String::new();
    while began.elapsed() < args.duration {
        let asked = Instant::now();
        line.clear();
        let trip = async {
            stream.get_mut().write_all(format!("line {}\n", report.answered).as_bytes()).await?;
            stream.read_line(&mut line).await
        };
        let failed = tokio::select! {
            _ = terminated.recv() => break,
            result = timeout(args.patience, trip) => match result {
                Ok(Ok(0)) => Some("closed by peer".to_owned()),
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(failure::name(&error)),
                Err(_) => Some("timeout".to_owned()),
            },
        };
        if let Some(error) = failed {
            (report.interrupted, report.error) = (true, Some(error));
            break;
        }
        report.answered += 1;
        report.last_answer_ms = began.elapsed().as_secs_f64() * 1e3;
        report.longest_wait_ms = report.longest_wait_ms.max(asked.elapsed().as_secs_f64() * 1e3);
        tokio::select! {
            _ = terminated.recv() => break,
            () = tokio::time::sleep(args.every) => {}
        }
    }
    report.ended_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok(())
}
