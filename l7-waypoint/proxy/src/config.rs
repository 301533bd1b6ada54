//! Flags, with Istio's environment variables as alternatives; in Istio's places, Istio's command lines.
mod environment;
mod metadata;
mod pilot_agent;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser, ValueEnum};
use l7_identity::{CaClient, CaConfig, TrustFiles};
use serde_json::{Map, Value, json};
use strata_runtime::logging;
use xds_proto::type_url;

use crate::sockets::Capture;
use environment::Environment;
use pilot_agent::Translated;

/// Release of Istio whose control plane protocol this proxy speaks.
pub(crate) const ISTIO_VERSION: &str = "1.31.0";

/// The upper layer of a node, or a waypoint.
///
/// As `node` it carries the captured connections of this node's pods: HBONE with mutual TLS, L4 authorization.
/// It waits for the agent on RUN-DIR/handoff.sock (or for istio-cni, see --pods-from) and needs CAP_SYS_ADMIN and CAP_NET_ADMIN to work inside the
/// pods' network namespaces. As `waypoint` it governs requests behind HBONE and needs no privilege.
///
/// `strata-proxy proxy waypoint …` and `strata-proxy proxy ztunnel …` take the place of Istio's own processes: with
/// their command line, environment and files (token, roots, pod labels), and the admin interface on 127.0.0.1:15000,
/// metrics on 15020 and readiness on 15021.
#[derive(Debug, Clone, Parser)]
#[command(name = "strata-proxy", version)]
pub(crate) struct Flags {
    /// What to be.
    #[arg(long, value_enum, env = "STRATA_ROLE")]
    pub role: Role,
    /// Name of this node, as Kubernetes knows it.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Folder of this node's unix sockets: the agent's handoff.sock, and our admin socket proxy.sock.
    #[arg(long, default_value = "/run/strata")]
    pub run_dir: PathBuf,
    /// Name of our admin socket below RUN-DIR.
    #[arg(long, default_value = "proxy.sock")]
    pub admin_socket: String,
    /// Who tells of this node's pods, and who captures their connections (role node): `agent` is ours, by
    /// RUN-DIR/handoff.sock; `zds:SOCKET` is istio-cni, by the socket it has for ztunnel. Beside istio-cni there is no
    /// short-cut, pods of one node talk over HBONE as well, and DNS queries its rules capture are relayed.
    #[arg(long, value_name = "agent|zds:SOCKET", default_value = "agent")]
    pub pods_from: PodsFrom,
    /// Control plane: http://IP:15010 (plaintext) or https://HOST:15012; https where no scheme is given.
    #[arg(long, env = "XDS_ADDRESS", default_value = "https://istiod.istio-system.svc:15012", value_parser = address)]
    pub xds_address: String,
    /// Certificate authority; the control plane if not given.
    #[arg(long, env = "CA_ADDRESS", value_parser = address)]
    pub ca_address: Option<String>,
    /// PEM roots to trust the control plane by; needed for https.
    #[arg(long, env = "XDS_ROOT_CA")]
    pub xds_root_ca: Option<PathBuf>,
    /// PEM roots to trust the certificate authority by; those of the control plane if not given.
    #[arg(long, env = "CA_ROOT_CA")]
    pub ca_root_ca: Option<PathBuf>,
    /// PEM roots of the mesh: workloads are trusted by them beside the roots in the CA's answers.
    #[arg(long)]
    pub mesh_roots: Option<PathBuf>,
    /// Revocation lists, PEM or DER, that peers' certificates are checked against.
    #[arg(long, env = "CRL_PATH", value_name = "FILE")]
    pub revocations: Option<PathBuf>,
    /// Name the control plane's certificate must carry if it is not the address's host.
    #[arg(long, env = "ALT_XDS_HOSTNAME")]
    pub xds_server_name: Option<String>,
    /// Name the CA's certificate must carry if it is not the address's host.
    #[arg(long, env = "ALT_CA_HOSTNAME")]
    pub ca_server_name: Option<String>,
    /// File with the bearer token shown to the control plane and the CA; read again for each use.
    #[arg(long, env = "AUTH_TOKEN")]
    pub token_path: Option<PathBuf>,
    /// The mesh's SPIFFE trust domain.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Network of this node's pods; empty in a mesh of one network.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Cluster this proxy is in.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Our address, as told to the control plane.
    #[arg(long, env = "INSTANCE_IP", default_value_t = IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)))]
    pub instance_ip: IpAddr,
    /// All our addresses, where there are more than that one.
    #[arg(long, env = "INSTANCE_IPS", value_delimiter = ',')]
    pub instance_ips: Vec<IpAddr>,
    /// Domain of our node id; NAMESPACE.svc.cluster.local if not given.
    #[arg(long)]
    pub dns_domain: Option<String>,
    /// Name of our pod.
    #[arg(long, env = "POD_NAME", default_value = "strata-proxy")]
    pub name: String,
    /// Namespace of our pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "istio-system")]
    pub namespace: String,
    /// Service account of our pod.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "ztunnel")]
    pub service_account: String,
    /// Gateway this waypoint belongs to (role waypoint).
    #[arg(long, env = "GATEWAY_NAME")]
    pub gateway: Option<String>,
    /// Data-plane threads.
    #[arg(long, env = "STRATA_CONCURRENCY", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// Also serve the admin interface (readiness, metrics, state) here, e.g. 127.0.0.1:15000.
    #[arg(long)]
    pub admin_addr: Option<SocketAddr>,
    /// Port of the HBONE server (role waypoint).
    #[arg(long, default_value_t = l7_hbone::PORT)]
    pub hbone_port: u16,
    /// Address of the HBONE server (role waypoint); all if not given.
    #[arg(long)]
    pub hbone_ip: Option<IpAddr>,
    /// Where Kubernetes asks for readiness: GET /healthz/ready. [::]:15021 for a waypoint if not given.
    #[arg(long)]
    pub readiness_addr: Option<SocketAddr>,
    /// Where Prometheus scrapes: GET /stats/prometheus or /metrics. [::]:15020 for a waypoint if not given.
    #[arg(long)]
    pub metrics_addr: Option<SocketAddr>,
    /// Grant the kernel short-cut between pods of this node where only L4 policy applies.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub shortcut: Switch,
    /// Answer the pods' DNS queries for the mesh's names, services without a name in the cluster's DNS among them (role
    /// node): those to the resolvers of --dns-resolvers; beside istio-cni all that its rules lead here.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub dns_capture: Switch,
    /// Resolvers asked for other names; those of /etc/resolv.conf if not given.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub dns_resolvers: Vec<IpAddr>,
    /// Serve this waypoint (its Gateway has `strata.io/placement: node`) for our own pods here, without a hop to a
    /// pod of it (role node). May be repeated.
    #[arg(long = "placed-waypoint", value_name = "NAMESPACE/GATEWAY")]
    pub placed_waypoints: Vec<GatewayName>,
    /// How long open connections may go on after SIGTERM.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE_SECONDS", default_value_t = 5)]
    pub drain_seconds: u64,
    /// Lifetime asked for of a certificate; it is renewed at half of it.
    #[arg(long, default_value_t = 24 * 3600)]
    pub secret_ttl_seconds: u64,
    /// Node metadata beyond what the flags say.
    #[arg(skip)]
    pub metadata: Map<String, Value>,
}

/// An address of the control plane; https is Istio's default scheme.
fn address(text: &str) -> Result<String, String> {
    match text.split_once("://") {
        None if text.is_empty() => Err("an address is HOST:PORT, with or without https:// before it".to_owned()),
        None => Ok(format!("https://{text}")),
        Some(("http" | "https", _)) => Ok(text.to_owned()),
        Some((scheme, _)) => Err(format!("scheme {scheme}: expected http or https")),
    }
}

/// Flags as this process was started, and what is to be said of them once there is a log.
pub(crate) struct Started {
    pub flags: Flags,
    pub logging: logging::Settings,
    pub remarks: Vec<String>,
}

impl Started {
    /// Reads the command line, environment and pod's files; ends the process on a mistake or `--help`, as clap does.
    pub(crate) fn of_process() -> Started {
        let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
        let translated = match pilot_agent::translate(arguments, &Environment::of_process()) {
            Ok(translated) => translated,
            Err(error) => Flags::command().error(clap::error::ErrorKind::ValueValidation, error).exit(),
        };
        let Translated { arguments, metadata, logging, remarks } = translated;
        let mut flags = Flags::parse_from(std::iter::once("strata-proxy".to_owned()).chain(arguments));
        // As pilot-agent: istiod's template names one address of the pod, a dual-stack pod has two. Without the other
        // istiod makes no chains for services' addresses of that family.
        if flags.role == Role::Waypoint && !metadata.is_empty() && flags.instance_ips.is_empty() {
            flags.instance_ips = own_addresses();
        }
        flags.metadata = metadata;
        Started { flags, logging, remarks }
    }
}

/// Addresses of this host's devices that others may reach; none if they cannot be listed.
fn own_addresses() -> Vec<IpAddr> {
    let devices = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let addresses = devices.filter_map(|device| {
        let address = device.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    });
    // fe80::/10 is a link's own (RFC 4291 section 2.5.6).
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    addresses.filter(|ip| !ip.is_loopback() && !link_local(ip)).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    Node,
    Waypoint,
}

/// A Gateway by namespace and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatewayName {
    pub namespace: String,
    pub gateway: String,
}

impl std::str::FromStr for GatewayName {
    type Err = String;

    fn from_str(text: &str) -> Result<GatewayName, String> {
        match text.split_once('/') {
            Some((namespace, gateway)) if !namespace.is_empty() && !gateway.is_empty() && !gateway.contains('/') => {
                Ok(GatewayName { namespace: namespace.to_owned(), gateway: gateway.to_owned() })
            }
            _ => Err("expected NAMESPACE/GATEWAY".to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// Who tells of this node's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PodsFrom {
    /// Our agent.
    Agent,
    /// istio-cni, on the socket it has for ztunnel.
    Zds(PathBuf),
}

impl PodsFrom {
    /// Whoever tells of pods captures their connections.
    pub(crate) fn capture(&self) -> Capture {
        match self {
            PodsFrom::Agent => Capture::Steered,
            PodsFrom::Zds(_) => Capture::Redirected,
        }
    }
}

impl std::str::FromStr for PodsFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<PodsFrom, String> {
        match (text, text.strip_prefix("zds:")) {
            ("agent", _) => Ok(PodsFrom::Agent),
            (_, Some(path)) if !path.is_empty() => Ok(PodsFrom::Zds(path.into())),
            _ => Err("expected agent, or zds: and the path of istio-cni's socket".to_owned()),
        }
    }
}

impl Flags {
    /// The socket of whoever tells of pods.
    pub(crate) fn pods_socket(&self) -> PathBuf {
        match &self.pods_from {
            PodsFrom::Agent => self.run_dir.join("handoff.sock"),
            PodsFrom::Zds(path) => path.clone(),
        }
    }

    pub(crate) fn drain_deadline(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// The client of the CA. A node proxy asks in the name of its pods.
    pub(crate) fn ca(&self) -> CaClient {
        let config = CaConfig {
            address: self.ca_address().to_owned(),
            root_ca: self.ca_root_ca.clone().or_else(|| self.xds_root_ca.clone()),
            server_name: self.ca_server_name.clone().or_else(|| self.xds_server_name.clone()),
            token: self.token_path.clone(),
            cluster_id: self.cluster_id.clone(),
            impersonate: self.role == Role::Node,
            ttl: Duration::from_secs(self.secret_ttl_seconds),
        };
        let files = TrustFiles { roots: self.mesh_roots.clone(), revocations: self.revocations.clone() };
        CaClient::new(config).with_files(files)
    }

    /// Where readiness is served; a waypoint's has a default.
    pub(crate) fn readiness_addr(&self) -> Option<SocketAddr> {
        self.readiness_addr.or_else(|| self.of_waypoint(15021))
    }

    /// Where metrics are served; a waypoint's has a default.
    pub(crate) fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr.or_else(|| self.of_waypoint(15020))
    }

    fn of_waypoint(&self, port: u16) -> Option<SocketAddr> {
        (self.role == Role::Waypoint).then_some(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))
    }

    pub(crate) fn ca_address(&self) -> &str {
        self.ca_address.as_deref().unwrap_or(&self.xds_address)
    }

    /// The xDS client's configuration of a waypoint placed on this node: the node's token, the waypoint's name.
    pub(crate) fn placed_xds(&self, waypoint: &GatewayName) -> xds_client::Config {
        let flags = Flags {
            role: Role::Waypoint,
            name: waypoint.gateway.clone(),
            namespace: waypoint.namespace.clone(),
            service_account: waypoint.gateway.clone(),
            gateway: Some(waypoint.gateway.clone()),
            dns_domain: None,
            // Ours are the node proxy's.
            metadata: Map::new(),
            ..self.clone()
        };
        flags.xds(&crate::waypoint::config::TYPES)
    }

    /// The xDS client's configuration for `types`.
    pub(crate) fn xds(&self, types: &[&str]) -> xds_client::Config {
        let endpoint = xds_client::Endpoint {
            address: self.xds_address.clone(),
            root_ca: self.xds_root_ca.clone(),
            server_name: self.xds_server_name.clone(),
            token: self.token_path.clone().map_or(xds_client::Token::None, xds_client::Token::File),
            cluster_id: self.cluster_id.clone(),
        };
        let mut config = xds_client::Config::new(endpoint, self.node_id(), self.node_metadata().into(), types);
        // A service whose secret is missing is closed by itself; the others are not to wait for it.
        config.late = vec![type_url::SECRET.to_owned()];
        config
    }

    /// `TYPE~IP~NAME.NAMESPACE~DOMAIN`.
    pub(crate) fn node_id(&self) -> String {
        let kind = match self.role {
            Role::Node => "ztunnel",
            Role::Waypoint => "waypoint",
        };
        let Flags { namespace, name, instance_ip, .. } = self;
        let domain = self.own_domain();
        format!("{kind}~{instance_ip}~{name}.{namespace}~{domain}")
    }

    fn own_domain(&self) -> String {
        self.dns_domain.clone().unwrap_or_else(|| format!("{}.svc.cluster.local", self.namespace))
    }

    /// DNS domain of the cluster: what follows `.svc.` in our own.
    pub(crate) fn cluster_domain(&self) -> String {
        let own = self.own_domain();
        own.split_once(".svc.").map_or(own.as_str(), |(_, domain)| domain).trim_end_matches('.').to_owned()
    }

    /// What istiod is told of us (xds-contract 1.2).
    pub(crate) fn node_metadata(&self) -> Map<String, Value> {
        let mut out = self.metadata.clone();
        let others = self.instance_ips.iter().filter(|ip| **ip != self.instance_ip);
        let ips: Vec<_> = std::iter::once(&self.instance_ip).chain(others).map(IpAddr::to_string).collect();
        let flags = [
            ("NAME", self.name.as_str()),
            ("NAMESPACE", &self.namespace),
            ("INSTANCE_IPS", &ips.join(",")),
            ("NODE_NAME", &self.node_name),
            ("SERVICE_ACCOUNT", &self.service_account),
            ("CLUSTER_ID", &self.cluster_id),
            ("NETWORK", &self.network),
        ];
        for (key, value) in flags.into_iter().filter(|(_, value)| !value.is_empty()) {
            out.insert(key.to_owned(), json!(value));
        }
        // Truthful unless somebody knows better: istiod chooses what it sends by it.
        out.entry("ISTIO_VERSION").or_insert_with(|| json!(ISTIO_VERSION));
        if self.role == Role::Waypoint {
            // istiod lists a waypoint in `istioctl proxy-status` only if this is there (xds-contract 7.5).
            let config = json!({ "discoveryAddress": self.xds_address, "concurrency": self.concurrency });
            out.entry("PROXY_CONFIG").or_insert(config);
        }
        if let Some(gateway) = &self.gateway {
            let labels = out.entry("LABELS").or_insert_with(|| json!({}));
            let mut labels = labels.as_object_mut();
            let wanted = [
                (metadata::GATEWAY_NAME, gateway.as_str()),
                ("gateway.networking.k8s.io/gateway-class-name", "istio-waypoint"),
                ("gateway.istio.io/managed", "istio.io-mesh-controller"),
            ];
            for (key, value) in wanted {
                if let Some(labels) = &mut labels {
                    labels.entry(key).or_insert_with(|| json!(value));
                }
            }
        }
        out
    }
}
