//! Flags, with Istio's environment variables as alternatives.
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use l7_identity::CaConfig;
use serde_json::json;
use xds_proto::type_url;

/// Release of Istio whose control plane protocol this proxy speaks.
const ISTIO_VERSION: &str = "1.31.0";

/// The upper layer of a node, or a waypoint.
///
/// As `node` it carries the captured connections of this node's pods: HBONE with mutual TLS, L4 authorization.
/// It waits for the agent on RUN-DIR/handoff.sock and needs CAP_SYS_ADMIN and CAP_NET_ADMIN to work inside the
/// pods' network namespaces. As `waypoint` it governs requests behind HBONE and needs no privilege.
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
    /// Control plane: http://IP:15010 (plaintext) or https://IP:15012.
    #[arg(long, env = "XDS_ADDRESS", default_value = "https://istiod.istio-system.svc:15012")]
    pub xds_address: String,
    /// Certificate authority; the control plane if not given.
    #[arg(long, env = "CA_ADDRESS")]
    pub ca_address: Option<String>,
    /// PEM roots to trust the control plane by; needed for https.
    #[arg(long, env = "XDS_ROOT_CA")]
    pub xds_root_ca: Option<PathBuf>,
    /// Name the control plane's certificate must carry if it is not the address's host.
    #[arg(long, env = "ALT_XDS_HOSTNAME")]
    pub xds_server_name: Option<String>,
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
    /// Where Kubernetes asks for readiness (role waypoint): GET /healthz/ready.
    #[arg(long, default_value = "0.0.0.0:15021")]
    pub readiness_addr: SocketAddr,
    /// Where Prometheus scrapes (role waypoint): GET /stats/prometheus.
    #[arg(long, default_value = "0.0.0.0:15020")]
    pub metrics_addr: SocketAddr,
    /// Grant the kernel short-cut between pods of this node where only L4 policy applies.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub shortcut: Switch,
    /// Serve this waypoint (its Gateway has `strata.io/placement: node`) for our own pods here, without a hop to a
    /// pod of it (role node). May be repeated.
    #[arg(long = "placed-waypoint", value_name = "NAMESPACE/GATEWAY")]
    pub placed_waypoints: Vec<GatewayName>,
    /// How long open connections may go on after SIGTERM.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE_SECONDS", default_value_t = 5)]
    pub drain_seconds: u64,
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

impl Flags {
    pub(crate) fn drain_deadline(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// The CA client's configuration. A node proxy asks in the name of its pods.
    pub(crate) fn ca(&self) -> CaConfig {
        CaConfig {
            address: self.ca_address.clone().unwrap_or_else(|| self.xds_address.clone()),
            root_ca: self.xds_root_ca.clone(),
            server_name: self.xds_server_name.clone(),
            token: self.token_path.clone(),
            cluster_id: self.cluster_id.clone(),
            impersonate: self.role == Role::Node,
            ttl: Duration::from_secs(24 * 3600),
        }
    }

    /// The xDS client's configuration of a waypoint placed on this node: the node's token, the waypoint's name.
    pub(crate) fn placed_xds(&self, waypoint: &GatewayName) -> xds_client::Config {
        let flags = Flags {
            role: Role::Waypoint,
            name: waypoint.gateway.clone(),
            namespace: waypoint.namespace.clone(),
            service_account: waypoint.gateway.clone(),
            gateway: Some(waypoint.gateway.clone()),
            ..self.clone()
        };
        flags.xds(&[type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER])
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
        let kind = match self.role {
            Role::Node => "ztunnel",
            Role::Waypoint => "waypoint",
        };
        let Flags { namespace, name, instance_ip, .. } = self;
        let node_id = format!("{kind}~{instance_ip}~{name}.{namespace}~{namespace}.svc.cluster.local");
        let mut metadata = json!({
            "NAME": name,
            "NAMESPACE": namespace,
            "INSTANCE_IPS": instance_ip.to_string(),
            "NODE_NAME": self.node_name,
            "SERVICE_ACCOUNT": self.service_account,
            "CLUSTER_ID": self.cluster_id,
            "ISTIO_VERSION": ISTIO_VERSION,
        });
        if !self.network.is_empty() {
            metadata["NETWORK"] = json!(self.network);
        }
        if let Some(gateway) = &self.gateway {
            metadata["LABELS"] = json!({
                "gateway.networking.k8s.io/gateway-name": gateway,
                "gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
                "gateway.istio.io/managed": "istio.io-mesh-controller",
            });
        }
        xds_client::Config::new(endpoint, node_id, metadata, types)
    }
}
