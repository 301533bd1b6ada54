//! `strata-echo`: the application the demo and the tests talk to, and the client they talk with.
//!
//! It knows nothing of the mesh: what it reports is what plain socket calls and request headers show an application.
//! Every client command prints one JSON document on standard output.
mod bench;
mod bookinfo;
mod call;
mod collect;
mod connect;
mod failure;
mod hold;
mod http1;
mod issuer;
mod serve;
mod stats;

use std::net::{SocketAddr, ToSocketAddrs};

use clap::{Parser, Subcommand};

/// The application that Strata's demo talks to, and the client it talks with.
///
/// Try it without a mesh:
///   strata-echo serve --http 127.0.0.1:8080 &
///   strata-echo call http://127.0.0.1:8080/hello --count 10
#[derive(Debug, Parser)]
#[command(name = "strata-echo", version, verbatim_doc_comment)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve HTTP/1.1, h2c and WebSocket on one port, plain TCP and UDP echo on two others
    Serve(serve::Args),
    /// Send HTTP requests and summarise the answers
    Call(call::Args),
    /// Connect once (TCP) or send one datagram (UDP) and show what the socket calls said
    Connect(connect::Args),
    /// Round trips of a small message over one TCP connection
    Rr(bench::RoundTrips),
    /// Bytes as fast as one TCP connection takes them
    Bulk(bench::Bulk),
    /// Keep one TCP connection open and report whether it was ever interrupted
    Hold(hold::Args),
    /// Serve the public keys of a token issuer (an OIDC-like JWKS document)
    Jwks(issuer::Jwks),
    /// Be one of the services of Istio's bookinfo sample
    Bookinfo(bookinfo::Args),
    /// Be a collector of spans (OTLP/gRPC, Zipkin): print each as a line of JSON
    Collect(collect::Args),
    /// Mint a signed token (JWT) with the issuer's keys
    Token(issuer::Token),
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Serve(args) => serve::run(args).await,
        Command::Call(args) => call::run(args).await,
        Command::Connect(args) => connect::run(args).await,
        Command::Rr(args) => args.run(),
        Command::Bulk(args) => args.run(),
        Command::Hold(args) => hold::run(args).await,
        Command::Jwks(args) => args.run().await,
        Command::Bookinfo(args) => bookinfo::run(args).await,
        Command::Collect(args) => collect::run(args).await,
        Command::Token(args) => args.run(),
    }
}

/// ADDRESS:PORT, or NAME:PORT as the first address of the name, in the resolver's order. Looked up once, before anything
/// is sent.
fn target(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| format!("{text:?}: {error}"))?;
    found.next().ok_or_else(|| format!("{text:?} has no address"))
}

/// Prints the result of a client command.
fn print(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
