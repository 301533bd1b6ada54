//! Latency and throughput of one connection, with blocking sockets: nothing but the path is measured.
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;

use crate::serve::duration;
use crate::stats::Latency;

/// Round trips to strata-echo's TCP port.
#[derive(Debug, clap::Args)]
pub(crate) struct RoundTrips {
    /// ADDRESS:PORT of `strata-echo serve --tcp`
    target: SocketAddr,
    #[arg(long, default_value_t = 2000)]
    count: usize,
    /// Bytes there and back
    #[arg(long, default_value_t = 128)]
    size: usize,
}

impl RoundTrips {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut stream = connect(self.target)?;
        // Letters: neither WHO nor SINK.
        let message = vec![b'e'; self.size.max(1)];
        let mut answer = vec![0; message.len()];
        let mut times = Vec::with_capacity(self.count);
        for _ in 0..self.count {
            let began = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut answer)?;
            times.push(began.elapsed());
        }
        let latency = Latency::of(&mut times);
        crate::print(&json!({"round_trips": self.count, "size": self.size, "latency_ms": latency,
                             "peer": stream.peer_addr()?.to_string()}))
    }
}

/// Bytes to strata-echo's TCP port.
#[derive(Debug, clap::Args)]
pub(crate) struct Bulk {
    /// ADDRESS:PORT of `strata-echo serve --tcp`
    target: SocketAddr,
    #[arg(long, value_parser = |text: &str| duration(text).ok_or("not a time"), default_value = "2s")]
    duration: Duration,
    /// Bytes per write
    #[arg(long, default_value_t = 131_072)]
    size: usize,
}

impl Bulk {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut stream = connect(self.target)?;
        stream.write_all(b"SINK\n")?;
        let chunk = vec![b'b'; self.size.max(1)];
        let (began, mut sent) = (Instant::now(), 5_u64);
        while began.elapsed() < self.duration {
            stream.write_all(&chunk)?;
            sent += chunk.len() as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("waiting for the server's count")?;
        let seconds = began.elapsed().as_secs_f64();
        let received: u64 = answer.trim().parse().with_context(|| format!("server's count {answer:?}"))?;
        if received != sent {
            bail!("{sent} bytes sent, {received} arrived");
        }
        crate::print(&json!({"bytes": sent, "seconds": seconds, "gbit_per_second": sent as f64 * 8e-9 / seconds}))
    }
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))
        .with_context(|| format!("connecting to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}
