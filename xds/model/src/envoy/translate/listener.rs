//! Listeners: `connect_terminate` and `main_internal`; the rest are internal hops that Strata makes itself.
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::config::listener::v3 as wire;
use xds_proto::envoy::envoy::extensions::filters::network as net;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3 as hcm_v3;
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as tls;
use xds_proto::envoy::google::protobuf as wkt;

use super::common::{TypedStruct, duration, is_true, opt_duration, timeout, type_name, u32_of, unpack};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::telemetry::{access_logs, stats, stats_as_json};
use super::{dispatch, hcm, rbac, tls as tls_context};
use crate::envoy::chain::{Chain, ChainKind, Keepalive, TcpChain, TcpTarget, Terminate, WaypointConfig};
use crate::envoy::filter::HttpFilterKind;
use crate::envoy::telemetry::StatsFilter;

/// Listeners between internal hops that Strata does without.
const INTERNAL: [&str; 3] = ["connect_originate", "inner_connect_originate", "outer_connect_originate"];

/// Reads one listener into `config`. A refusal of single chains is returned with `partial` set.
pub(super) fn listener(
    message: wire::Listener,
    config: &mut WaypointConfig,
    report: &mut Report,
) -> Result<(), (Refusal, bool)> {
    match message.name.as_str() {
        "connect_terminate" => {
            let (terminate, refusal) = terminate(message, report).map_err(|refusal| (refusal, false))?;
            config.terminate = Some(terminate);
            refusal.map_or(Ok(()), |refusal| Err((refusal, true)))
        }
        "main_internal" => main_internal(message, config, report),
        name if INTERNAL.contains(&name) => Ok(()),
        name => Err((Refusal::new("name", format!("a listener {name} is not known")), false)),
    }
}

fn main_internal(
    mut message: wire::Listener,
    config: &mut WaypointConfig,
    report: &mut Report,
) -> Result<(), (Refusal, bool)> {
    let chains = take(&mut message.filter_chains);
    let mut read = |message: &mut wire::Listener, report: &mut Report| -> Refusable<dispatch::Dispatch> {
        for filter in take(&mut message.listener_filters) {
            listener_filter(&filter)?;
        }
        let matcher =
            message.filter_chain_matcher.take().ok_or_else(|| Refusal::new("filter_chain_matcher", "missing"))?;
        let dispatch = dispatch::dispatch(matcher).at("filter_chain_matcher")?;
        message.use_original_dst.take();
        take(&mut message.traffic_direction);
        message.listener_specifier.take();
        message.listener_filters_timeout.take();
        take(&mut message.continue_on_listener_filters_timeout);
        config.no_chain_logs = access_logs(take(&mut message.access_log), report);
        take(&mut message.name);
        if message.default_filter_chain.is_some() {
            return Err(Refusal::new("default_filter_chain", "not supported"));
        }
        report.ignore_rest("", message);
        Ok(dispatch)
    };
    let dispatch = read(&mut message, report).map_err(|refusal| (refusal, false))?;
    config.dispatch = dispatch.rules;
    config.authorities = dispatch.authorities;
    let mut refusals = Vec::new();
    for message in chains {
        let name = message.name.clone();
        let result = report.within(format!("chain {name}"), |report| chain(message, report));
        let kind = result.unwrap_or_else(|Refusal(reason)| {
            report.fails_closed(format!("chain {name}"), format!("connections are closed: {reason}"));
            refusals.push(format!("chain {name}: {reason}"));
            ChainKind::Closed { reason }
        });
        config.chains.insert(name.clone(), Chain { name, kind });
    }
    if refusals.is_empty() { Ok(()) } else { Err((Refusal(refusals.join("; ")), true)) }
}

/// What the inspectors find is found by Strata's own sniffing.
fn listener_filter(filter: &wire::ListenerFilter) -> Refusable<()> {
    let type_url = match &filter.config_type {
        Some(wire::listener_filter::ConfigType::TypedConfig(any)) => type_name(&any.type_url),
        _ => "",
    };
    match type_url {
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst"
        | "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector"
        | "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => Ok(()),
        other => Err(Refusal::new(format!("listener_filters {}", filter.name), format!("{other} is not supported"))),
    }
}

fn chain(mut message: wire::FilterChain, report: &mut Report) -> Refusable<ChainKind> {
    take(&mut message.name);
    message.metadata.take();
    let filters = take(&mut message.filters);
    refuse_rest(&message)?;
    let (mut network, mut counted) = (Vec::new(), None);
    let count = filters.len();
    for (index, filter) in filters.into_iter().enumerate() {
        let wire::Filter { name, config_type } = filter;
        let any = match config_type {
            Some(wire::filter::ConfigType::TypedConfig(any)) => any,
            Some(wire::filter::ConfigType::ConfigDiscovery(_)) => {
                return Err(Refusal::new(&name, "filters by extension discovery (Wasm) are not supported"));
            }
            None => return Err(Refusal::new(&name, "no configuration")),
        };
        let last = index + 1 == count;
        match network_filter(&any, report).at(&name)? {
            Network::Rbac(rbac) if !last => network.push(rbac),
            Network::Stats(config) if !last => counted = Some(config),
            Network::Nothing if !last => {}
            Network::Http(chain) if last && network.is_empty() => return Ok(ChainKind::Http(chain)),
            Network::Tcp(mut chain) if last => {
                (chain.rbac, chain.stats) = (network, counted);
                return Ok(ChainKind::Tcp(chain));
            }
            _ => return Err(Refusal::new(name, "unexpected at this place of the chain")),
        }
    }
    Err(Refusal::new("filters", "no terminal filter"))
}

enum Network {
    Nothing,
    Stats(StatsFilter),
    Rbac(crate::envoy::rbac::Rbac),
    Http(Box<crate::envoy::chain::HttpChain>),
    Tcp(Box<TcpChain>),
}

fn network_filter(any: &wkt::Any, report: &mut Report) -> Refusable<Network> {
    Ok(match type_name(&any.type_url) {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            Network::Http(Box::new(hcm::chain(unpack(any)?, report)?))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            Network::Tcp(Box::new(tcp_proxy(unpack(any)?, report)?))
        }
        "envoy.extensions.filters.network.rbac.v3.RBAC" => Network::Rbac(rbac::network_filter(unpack(any)?, report)?),
        "envoy.extensions.filters.network.set_filter_state.v3.Config" => {
            let net::set_filter_state::v3::Config { on_new_connection, on_downstream_tls_handshake, .. } = unpack(any)?;
            hcm::filter_state(on_new_connection)?;
            hcm::filter_state(on_downstream_tls_handshake)?;
            Network::Nothing
        }
        "stats.PluginConfig" => Network::Stats(stats(unpack(any)?, report)),
        "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct" => {
            let TypedStruct { type_url, value: _ } = unpack(any)?;
            match type_name(&type_url) {
                // Telemetry: the peer is looked up by its address in any case.
                "envoy.tcp.metadataexchange.config.MetadataExchange" => Network::Nothing,
                "stats.PluginConfig" => Network::Stats(stats_as_json(report)),
                other => return Err(Refusal::new("unknown filter", other)),
            }
        }
        other => return Err(Refusal::new("unknown filter", other)),
    })
}

fn tcp_proxy(mut message: net::tcp_proxy::v3::TcpProxy, report: &mut Report) -> Refusable<TcpChain> {
    use net::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
    use xds_proto::envoy::envoy::r#type::v3::hash_policy::PolicySpecifier;
    let target = match message.cluster_specifier.take() {
        Some(ClusterSpecifier::Cluster(name)) => TcpTarget::Cluster(name),
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            let mut shares = Vec::new();
            for mut share in weighted.clusters {
                shares.push((take(&mut share.name), take(&mut share.weight)));
                refuse_rest(&share).at("weighted_clusters")?;
            }
            if shares.iter().all(|(_, weight)| *weight == 0) {
                return Err(Refusal::new("weighted_clusters", "all weights are 0"));
            }
            TcpTarget::Weighted(shares)
        }
        None => return Err(Refusal::new("cluster_specifier", "missing")),
    };
    let mut hash_source_ip = false;
    for policy in take(&mut message.hash_policy) {
        match policy.policy_specifier {
            Some(PolicySpecifier::SourceIp(_)) => hash_source_ip = true,
            _ => return Err(Refusal::new("hash_policy", "only source_ip is supported")),
        }
    }
    take(&mut message.stat_prefix);
    let chain = TcpChain {
        rbac: Vec::new(),
        target,
        idle_timeout: timeout("idle_timeout", message.idle_timeout.take(), Some(Duration::from_secs(3600)))?,
        max_connection_duration: opt_duration(
            "max_downstream_connection_duration",
            message.max_downstream_connection_duration.take(),
        )?,
        hash_source_ip,
        max_connect_attempts: u32_of(message.max_connect_attempts.take()).unwrap_or(1),
        access_logs: access_logs(take(&mut message.access_log), report),
        stats: None,
    };
    if message.tunneling_config.is_some() {
        return Err(Refusal::new("tunneling_config", "not supported"));
    }
    report.ignore_rest("tcp_proxy", &message);
    Ok(chain)
}

/// The HBONE listener; with the refusal if it stays closed.
fn terminate(mut message: wire::Listener, report: &mut Report) -> Refusable<(Terminate, Option<Refusal>)> {
    let port = match message.address.take().and_then(|address| address.address) {
        Some(core::address::Address::SocketAddress(address)) => match address.port_specifier {
            Some(core::socket_address::PortSpecifier::PortValue(port)) => {
                u16::try_from(port).map_err(|_| Refusal::new("port_value", format!("{port} is no port")))?
            }
            _ => return Err(Refusal::new("address", "no port")),
        },
        _ => return Err(Refusal::new("address", "no socket address")),
    };
    let mut out = Terminate {
        port,
        peer_sans: Vec::new(),
        rbac: Vec::new(),
        max_concurrent_streams: None,
        keepalive: None,
        access_logs: Vec::new(),
        closed: None,
    };
    let outcome = terminate_chain(&mut message, &mut out, report);
    take(&mut message.name);
    take(&mut message.additional_addresses);
    message.connection_balance_config.take();
    access_logs(take(&mut message.access_log), report);
    report.ignore_rest("", &message);
    let refusal = outcome.err();
    out.closed = refusal.as_ref().map(|Refusal(reason)| reason.clone());
    if let Some(reason) = &out.closed {
        report.fails_closed("", format!("nothing is accepted: {reason}"));
    }
    Ok((out, refusal))
}

fn terminate_chain(message: &mut wire::Listener, out: &mut Terminate, report: &mut Report) -> Refusable<()> {
    let [chain] = <[wire::FilterChain; 1]>::try_from(take(&mut message.filter_chains))
        .map_err(|chains| Refusal::new("filter_chains", format!("{} instead of one", chains.len())))?;
    let wire::FilterChain { filters, transport_socket, .. } = chain;
    let any = tls_context::typed(transport_socket.ok_or_else(|| Refusal::new("transport_socket", "missing"))?)?;
    let mut context: tls::DownstreamTlsContext = unpack(&any)?;
    if !is_true(context.require_client_certificate.take()) {
        return Err(Refusal::new("require_client_certificate", "must be true"));
    }
    let common = context.common_tls_context.take().ok_or_else(|| Refusal::new("common_tls_context", "missing"))?;
    out.peer_sans = tls_context::mesh_peer(common, report).at("common_tls_context")?;
    refuse_rest(&context).at("transport_socket")?;
    let [filter] = <[wire::Filter; 1]>::try_from(filters)
        .map_err(|filters| Refusal::new("filters", format!("{} instead of one", filters.len())))?;
    let Some(wire::filter::ConfigType::TypedConfig(any)) = filter.config_type else {
        return Err(Refusal::new(filter.name, "no configuration"));
    };
    connect_manager(unpack(&any)?, out, report).at("connect_terminate")
}

fn connect_manager(
    mut message: hcm_v3::HttpConnectionManager,
    out: &mut Terminate,
    report: &mut Report,
) -> Refusable<()> {
    if let Some(http2) = message.http2_protocol_options.as_mut() {
        out.max_concurrent_streams = u32_of(http2.max_concurrent_streams);
        if let Some(keepalive) = http2.connection_keepalive.take() {
            let part = |value: Option<wkt::Duration>| value.as_ref().map(duration).transpose();
            out.keepalive = part(keepalive.interval)?
                .map(|interval| Ok(Keepalive { interval, timeout: part(keepalive.timeout)?.unwrap_or(interval) }))
                .transpose()?;
        }
    }
    let chain = hcm::chain(message, report)?;
    out.access_logs = chain.access_logs;
    for filter in chain.filters {
        match filter.kind {
            HttpFilterKind::Rbac(rbac) => out.rbac.push(*rbac),
            HttpFilterKind::PeerMetadata | HttpFilterKind::FilterState(_) | HttpFilterKind::Router(_) => {}
            _ => return Err(Refusal::new(filter.name, "not supported on the HBONE listener")),
        }
    }
    Ok(())
}
