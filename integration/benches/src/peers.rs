//! The peers, each told to do the same: `x-user: jason` to v2, everything else 90/10 to v1 and v2, an added
//! request header, keep-alive to the upstreams, one worker.
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::measure::{require, wait_for};

/// Addresses of the two upstream versions (engine.yaml has the same).
const UPSTREAMS: [&str; 2] = ["127.0.0.1", "127.0.0.2"];
const UPSTREAM_PORT: u16 = 19001;

/// A running process, killed with its children when dropped.
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    child: Child,
}

impl Peer {
    /// Starts `command` and waits until `port` of 127.0.0.1 answers.
    pub(crate) fn start(name: &'static str, port: u16, command: &mut Command) -> Result<Self> {
        Self::start_at(name, (Ipv4Addr::LOCALHOST, port).into(), command)
    }

    /// Starts `command` and waits until `addr` answers.
    pub(crate) fn start_at(name: &'static str, addr: SocketAddr, command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {name}: {command:?}"))?;
        let peer = Self { name, port: addr.port(), child };
        wait_for(&format!("{name} to listen on {addr}"), || TcpStream::connect(addr).ok())?;
        Ok(peer)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for pid in crate::measure::family(self.child.id()) {
            // Already gone is fine: the family is killed child by child.
            let _gone = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let _reaped = self.child.wait();
    }
}

/// Two upstreams that answer 1 KiB, in one nginx.
pub(crate) fn upstreams(folder: &Path) -> Result<Peer> {
    upstreams_at(folder, &UPSTREAMS)
}

/// Upstreams at these addresses, versions v1 and v2 in turn.
pub(crate) fn upstreams_at(folder: &Path, addresses: &[&str]) -> Result<Peer> {
    let body = "x".repeat(1024);
    let server = |(index, address): (usize, &&str)| {
        let version = index % 2 + 1;
        format!(
            "server {{ listen {address}:{UPSTREAM_PORT}; location / {{ add_header x-version v{version}; return 200 '{body}'; }} }}\n"
        )
    };
    let servers: String = addresses.iter().enumerate().map(server).collect();
    nginx(folder, "upstream", UPSTREAM_PORT, &servers)
}

/// Strata's engine as the proxy.
pub(crate) fn strata(program: &Path, port: u16) -> Result<Peer> {
    require(program)?;
    let mut command = Command::new(program);
    command.args(["--listen", &format!("127.0.0.1:{port}")]);
    Peer::start("strata", port, &mut command)
}

/// nginx as the proxy.
pub(crate) fn nginx_proxy(folder: &Path, port: u16) -> Result<Peer> {
    let [v1, v2] = UPSTREAMS.map(|address| format!("{address}:{UPSTREAM_PORT}"));
    let config = format!(
        "upstream v1 {{ server {v1}; keepalive 64; }}\nupstream v2 {{ server {v2}; keepalive 64; }}\n\
         split_clients $request_id $split {{ 90% v1; * v2; }}\nmap $http_x_user $target {{ jason v2; default $split; }}\n\
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_http_version 1.1; proxy_set_header Connection \"\"; \
         proxy_set_header x-request-id $request_id; proxy_pass http://$target; }} }}\n"
    );
    nginx(folder, "nginx", port, &config)
}

fn nginx(folder: &Path, name: &'static str, port: u16, servers: &str) -> Result<Peer> {
    let config = folder.join(format!("{name}.conf"));
    let text = format!(
        "daemon off; worker_processes 1; pid {}/{name}.pid; error_log /dev/null;\n\
         events {{ worker_connections 4096; }}\nhttp {{ access_log off; keepalive_requests 1000000000;\n{servers}}}\n",
        folder.display()
    );
    std::fs::write(&config, text)?;
    Peer::start(name, port, Command::new("nginx").arg("-c").arg(&config).stderr(Stdio::null()))
}

/// HAProxy as the proxy.
pub(crate) fn haproxy(folder: &Path, port: u16) -> Result<Peer> {
    let config = folder.join("haproxy.cfg");
    let [v1, v2] = UPSTREAMS.map(|address| format!("{address}:{UPSTREAM_PORT}"));
    let text = format!(
        "global\n nbthread 1\n maxconn 4096\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n \
         option http-keep-alive\n http-reuse always\nfrontend in\n bind 127.0.0.1:{port}\n \
         http-request set-header x-request-id %[uuid]\n acl jason hdr(x-user) -m str jason\n acl canary rand(100) lt 10\n \
         use_backend v2 if jason\n use_backend v2 if canary\n default_backend v1\n\
         backend v1\n server s {v1}\nbackend v2\n server s {v2}\n"
    );
    std::fs::write(&config, text)?;
    Peer::start("haproxy", port, Command::new("haproxy").args(["-db", "-f"]).arg(&config).stderr(Stdio::null()))
}

/// Envoy as the proxy.
pub(crate) fn envoy(folder: &Path, port: u16) -> Result<Peer> {
    let config = folder.join("envoy.json");
    std::fs::write(&config, envoy_config(port))?;
    envoy_with(&config, (Ipv4Addr::LOCALHOST, port).into())
}

/// Envoy with a bootstrap file that makes it listen at `addr`.
pub(crate) fn envoy_with(bootstrap: &Path, addr: SocketAddr) -> Result<Peer> {
    let program = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/venv/bin/envoy"));
    require(&program)?;
    let mut command = Command::new(program);
    command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"]).arg(bootstrap);
    Peer::start_at("envoy", addr, &mut command)
}

fn envoy_config(port: u16) -> String {
    let address = |ip: &str, port: u16| format!(r#"{{"socket_address": {{"address": "{ip}", "port_value": {port}}}}}"#);
    let cluster = |name: &str, ip: &str| {
        format!(
            r#"{{"name": "{name}", "type": "STATIC", "load_assignment": {{"cluster_name": "{name}", "endpoints": [{{"lb_endpoints": [{{"endpoint": {{"address": {}}}}}]}}]}}}}"#,
            address(ip, UPSTREAM_PORT)
        )
    };
    let routes = r#"[
      {"match": {"prefix": "/", "headers": [{"name": "x-user", "string_match": {"exact": "jason"}}]}, "route": {"cluster": "v2"}},
      {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]}}}]"#;
    let manager = format!(
        r#"{{"@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in", "route_config": {{"virtual_hosts": [{{"name": "all", "domains": ["*"], "routes": {routes}}}]}},
        "http_filters": [{{"name": "router", "typed_config": {{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}}}]}}"#
    );
    format!(
        r#"{{"static_resources": {{"listeners": [{{"address": {}, "filter_chains": [{{"filters": [{{"name": "hcm", "typed_config": {manager}}}]}}]}}],
        "clusters": [{}, {}]}}}}"#,
        address("127.0.0.1", port),
        cluster("v1", UPSTREAMS[0]),
        cluster("v2", UPSTREAMS[1])
    )
}
