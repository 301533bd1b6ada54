//! HTTP through a waypoint: strata-proxy and Envoy, one worker each, given the same resources. Callers come through HBONE; the
//! destinations are reached in plaintext or through HBONE.
mod envoy;
mod tunnels;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use compat_control::ca::Authority;
use compat_control::{Config, Control, Objects, State};
use compat_translate::{MeshOptions, translate};
use l7_identity::{CaClient, CaConfig, IdentityManager};

use crate::Load;
use crate::measure::{Sample, median, require, wait_for, wrk};
use crate::peers::{self, Peer};

const OBJECTS: &str = include_str!("waypoint/mesh.yaml");
/// Pods of the mesh, and pods outside it.
const TUNNELLED: [&str; 2] = ["127.0.0.1", "127.0.0.2"];
const PLAIN: [&str; 2] = ["127.0.0.5", "127.0.0.6"];
/// The services in front of them.
const SERVICES: [(&str, Ipv4Addr); 2] =
    [("plaintext", Ipv4Addr::new(10, 96, 9, 9)), ("HBONE", Ipv4Addr::new(10, 96, 9, 8))];
const STRATA: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)), l7_hbone::PORT);
const ENVOY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 4)), l7_hbone::PORT);
/// First of the ports that lead through a waypoint to a service.
const PORTS: u16 = 19021;

/// Both waypoints and what is around them.
struct Bench {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    control: Control,
}

/// One waypoint, on the way to one service.
struct Way {
    destination: &'static str,
    peer: usize,
    port: u16,
}

pub(crate) fn run(load: Load) -> Result<()> {
    let Load { seconds, connections, runs } = load;
    let bench = Bench::start()?;
    let _upstreams = peers::upstreams_at(bench.folder.path(), &[TUNNELLED, PLAIN].concat())?;
    let waypoints = [bench.strata()?, bench.envoy()?];
    let mut ways = Vec::new();
    for (peer, waypoint) in [STRATA, ENVOY].into_iter().enumerate() {
        for (destination, ip) in SERVICES {
            let port = PORTS + u16::try_from(ways.len())?;
            let client = tunnels::client(bench.identities(), local(port), waypoint, (ip, 80).into());
            bench.runtime.block_on(client)?;
            ways.push(Way { destination, peer, port });
        }
    }
    for way in &ways {
        let found = wait_for(&format!("{} to answer", waypoints[way.peer].name), || answers(way.port))?;
        ensure!(found.contains("x-version: v"), "{}: {found}", waypoints[way.peer].name);
    }
    let measured = |way: &Way, seconds| wrk(&url(way.port), &[], waypoints[way.peer].pid(), connections, seconds);
    for way in &ways {
        measured(way, 1)?;
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); ways.len()];
    for run in 1..=runs {
        for (way, samples) in ways.iter().zip(&mut samples) {
            eprintln!("run {run}/{runs}: {}, {} to the destination", waypoints[way.peer].name, way.destination);
            samples.push(measured(way, seconds)?);
        }
    }
    let medians = samples.into_iter().map(median).collect::<Result<Vec<_>>>()?;
    print(&waypoints, &ways, &medians);
    bench.runtime.block_on(bench.control.stop());
    Ok(())
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn url(port: u16) -> String {
    format!("http://{}/", local(port))
}

/// The head of an answer with 200, if there is one.
fn answers(port: u16) -> Option<String> {
    let output =
        Command::new("curl").args(["-sS", "-m", "2", "-D", "-", "-o", "/dev/null", &url(port)]).output().ok()?;
    let head = String::from_utf8_lossy(&output.stdout).to_lowercase();
    head.starts_with("http/1.1 200").then_some(head)
}

impl Bench {
    fn start() -> Result<Bench> {
        l7_identity::install_provider();
        let folder = tempfile::tempdir()?;
        let objects = folder.path().join("mesh.yaml");
        std::fs::write(&objects, OBJECTS)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let any = local(0);
        let config = Config {
            objects: Objects::Folders(vec![objects]),
            state: State::Folder(folder.path().join("state")),
            xds_addr: Some(any),
            secure_addr: any,
            run_dir: folder.path().join("run"),
            admin_addr: None,
            status_addr: None,
            mesh: MeshOptions::default(),
        };
        let control = runtime.block_on(Control::start(config))?;
        wait_for("the control plane", || control.pending().is_empty().then_some(()))?;
        let bench = Bench { folder, runtime, control };
        for ip in TUNNELLED {
            bench.runtime.block_on(tunnels::destination(bench.identities(), ip.parse()?))?;
        }
        Ok(bench)
    }

    fn state(&self, path: &str) -> PathBuf {
        self.folder.path().join("state").join(path)
    }

    fn xds_address(&self) -> String {
        self.control.xds_addr.map(|addr| format!("http://{addr}")).unwrap_or_default()
    }

    /// Certificates for the node's pods.
    fn identities(&self) -> IdentityManager {
        let ca = CaClient::new(CaConfig {
            address: self.xds_address(),
            root_ca: None,
            server_name: None,
            token: Some(self.state("tokens/node/here")),
            cluster_id: "Kubernetes".to_owned(),
            impersonate: true,
            ttl: Duration::from_secs(3600),
        });
        IdentityManager::new(ca, self.runtime.handle().clone())
    }

    /// The product, as it runs in a pod.
    fn strata(&self) -> Result<Peer> {
        let program = std::env::current_exe()?.with_file_name("strata-proxy");
        require(&program)?;
        let mut command = Command::new(program);
        command
            .args(["--role", "waypoint", "--concurrency", "1", "--name", "waypoint", "--namespace", "bench"])
            .args(["--service-account", "waypoint", "--gateway", "waypoint", "--node-name", "here"])
            .args(["--xds-address", &self.xds_address()])
            .args(["--hbone-ip", &STRATA.ip().to_string(), "--hbone-port", &STRATA.port().to_string()])
            .args(["--readiness-addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0"])
            .arg("--token-path")
            .arg(self.state("tokens/sa/bench/waypoint"))
            .arg("--run-dir")
            .arg(self.folder.path().join("run"))
            .stderr(Stdio::null());
        Peer::start_at("strata", STRATA, &mut command)
    }

    fn envoy(&self) -> Result<Peer> {
        let file = |name: &str, text: &str| -> Result<PathBuf> {
            let path = self.folder.path().join(name);
            std::fs::write(&path, text)?;
            Ok(path)
        };
        let authority = Authority::open(&self.state(""))?;
        let key = rcgen::KeyPair::generate()?;
        let request = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
        let identity = tunnels::identity("waypoint")?.to_string();
        let certificate = authority.sign(&request, &identity, Duration::from_secs(3600))?;
        let (chain, key) = (file("chain.pem", &certificate)?, file("key.pem", &key.serialize_pem())?);
        let root = file("root.pem", authority.root_pem())?;
        envoy::secrets(self.folder.path(), &chain, &key, &root)?;

        let (objects, faults) = compat_objects::read_str(OBJECTS, Path::new("mesh.yaml"));
        ensure!(faults.is_empty(), "{faults:?}");
        let output = translate(&objects, &MeshOptions::default());
        let waypoint = output.waypoints.get("bench/waypoint").context("no waypoint came of mesh.yaml")?;
        let bootstrap = envoy::bootstrap(waypoint, ENVOY, self.folder.path())?;
        let bootstrap = file("envoy.json", &bootstrap.to_string())?;
        peers::envoy_with(&bootstrap, ENVOY)
    }
}

fn print(waypoints: &[Peer], ways: &[Way], medians: &[Sample]) {
    let mut table = Table::new();
    table.set_header([
        "to the destination",
        "waypoint, 1 worker",
        "requests/s",
        "CPU us/request",
        "/ Envoy",
        "p50 ms",
        "p99 ms",
    ]);
    for (destination, _) in SERVICES {
        let here = || ways.iter().zip(medians).filter(|(way, _)| way.destination == destination);
        let envoy = here().find(|(way, _)| waypoints[way.peer].name == "envoy").map_or(f64::NAN, |(_, s)| s.cpu_us);
        for (way, sample) in here() {
            table.add_row([
                destination.to_owned(),
                waypoints[way.peer].name.to_owned(),
                format!("{:.0}", sample.requests_per_second),
                format!("{:.1}", sample.cpu_us),
                format!("{:.2}", sample.cpu_us / envoy),
                format!("{:.2}", sample.p50_ms),
                format!("{:.2}", sample.p99_ms),
            ]);
        }
    }
    println!("{table}");
}
