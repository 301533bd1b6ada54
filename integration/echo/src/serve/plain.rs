//! TCP and UDP without HTTP.
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::{Me, plain_address};

/// Answers every datagram with who answered, who asked, and what was said.
pub(super) async fn udp(socket: UdpSocket, me: Arc<Me>) {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, peer)) => {
                let said = String::from_utf8_lossy(&buffer[..length.min(256)]).into_owned();
                let seen = json!({"name": me.name, "version": me.version, "peer": plain_address(peer).to_string(),
                                  "said": said});
                // A client that does not listen any more is its own problem.
                let _ = socket.send_to(seen.to_string().as_bytes(), peer).await;
            }
            // ICMP errors of earlier answers arrive here.
            Err(error) => eprintln!("udp: {error}"),
        }
    }
}

/// See [`super::Args::tcp`].
pub(super) async fn tcp(listener: TcpListener, me: Arc<Me>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let me = me.clone();
                tokio::spawn(async move {
                    if let Err(error) = conversation(stream, &me).await {
                        eprintln!("tcp: {error}");
                    }
                });
            }
            Err(error) => {
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn conversation(mut stream: TcpStream, me: &Me) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 128 << 10];
    let mut first = true;
    loop {
        let length = stream.read(&mut buffer).await?;
        match &buffer[..length] {
            [] => return stream.shutdown().await,
            said if first && said.starts_with(b"WHO") => {
                let (peer, local) = (plain_address(stream.peer_addr()?), plain_address(stream.local_addr()?));
                let seen = json!({"name": me.name, "version": me.version, "namespace": me.namespace,
                                  "peer": peer.to_string(), "local": local.to_string()});
                stream.write_all(format!("{seen}\n").as_bytes()).await?;
            }
            said if first && said.starts_with(b"SINK") => {
                return sink(stream, &mut vec![0; 128 << 10], said.len() as u64).await;
            }
            said => stream.write_all(said).await?,
        }
        first = false;
    }
}

/// Takes everything and answers with the number of bytes once the client has finished.
async fn sink(mut stream: TcpStream, buffer: &mut [u8], mut total: u64) -> std::io::Result<()> {
    loop {
        match stream.read(buffer).await? {
            0 => break,
            length => total += length as u64,
        }
    }
    stream.write_all(format!("{total}\n").as_bytes()).await?;
    stream.shutdown().await
}
