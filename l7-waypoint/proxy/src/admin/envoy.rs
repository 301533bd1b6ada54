//! Envoy's admin interface, as far as `istioctl proxy-config`, `proxy-status`, `authz` and `bug-report` ask: the
//! resources in force as they came, in the messages of `envoy.admin.v3` as protobuf's JSON.
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use l7_identity::{CertificateStatus, IdentityManager};
use serde_json::{Map, Value, json};
use strata_runtime::Readiness;
use strata_runtime::admin::{Admin, Reply};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use xds_proto::{json as proto_json, type_url};

use crate::config::Flags;
use crate::waypoint::config::State;
use crate::waypoint::held::{Entry, Held, Version};

const ADMIN: &str = "type.googleapis.com/envoy.admin.v3.";
const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// What the answers are made of.
pub(crate) struct Envoy {
    pub flags: Flags,
    pub state: Arc<State>,
    pub identities: IdentityManager,
    pub readiness: Readiness,
    pub started: Instant,
}

impl Envoy {
    /// Adds Envoy's paths.
    pub(crate) fn serve(self, admin: Admin) -> Admin {
        let envoy = Arc::new(self);
        let with = |answer: fn(&Envoy, &str) -> Reply| {
            let envoy = envoy.clone();
            move |query: String| {
                let reply = answer(&envoy, &query);
                async move { reply }
            }
        };
        admin
            .get("/config_dump", with(|envoy, _| Reply::Json(envoy.config_dump())))
            .get("/clusters", with(|envoy, query| envoy.state.held(|held| clusters(held, query))))
            .get("/listeners", with(|envoy, query| envoy.state.held(|held| listeners(held, query))))
            .get("/certs", with(|envoy, _| Reply::Json(certs(&envoy.identities.status()))))
            .get("/server_info", with(|envoy, _| Reply::Json(envoy.server_info())))
            .get("/ready", with(|envoy, _| Reply::Text(format!("{}\n", envoy.server_state()))))
    }

    /// All sections at once: EDS too, which Envoy shows only when asked to.
    fn config_dump(&self) -> Value {
        let certificates = self.identities.status();
        self.state.held(|held| {
            let listeners = held.of(type_url::LISTENER).map(|(name, entry)| listener(name, entry)).collect::<Vec<_>>();
            let mut routes = Vec::new();
            for (_, entry) in held.of(type_url::LISTENER) {
                if let Some(version) = &entry.accepted {
                    inline_routes(&body(type_url::LISTENER, version), version, &mut routes);
                }
            }
            let clusters = held.of(type_url::CLUSTER).map(|(_, e)| dynamic("cluster", type_url::CLUSTER, e)).collect();
            let endpoints =
                held.of(type_url::ENDPOINT).map(|(_, e)| dynamic("endpointConfig", type_url::ENDPOINT, e)).collect();
            let extensions =
                held.of(type_url::EXTENSION).map(|(_, e)| dynamic("ecdsFilter", type_url::EXTENSION, e)).collect();
            json!({ "configs": [
                section("BootstrapConfigDump", "bootstrap", self.bootstrap()),
                section("ClustersConfigDump", "dynamicActiveClusters", clusters),
                section("EndpointsConfigDump", "dynamicEndpointConfigs", endpoints),
                section("ListenersConfigDump", "dynamicListeners", listeners.into()),
                section("RoutesConfigDump", "staticRouteConfigs", routes.into()),
                section("SecretsConfigDump", "dynamicActiveSecrets", secrets(&certificates)),
                section("EcdsConfigDump", "ecdsFilters", extensions),
            ] })
        })
    }

    fn node(&self) -> Value {
        let version = |part: usize| env!("CARGO_PKG_VERSION").split('.').nth(part).and_then(|p| p.parse::<u32>().ok());
        json!({
            "id": self.flags.node_id(),
            "cluster": self.flags.gateway.as_ref().map(|name| format!("{name}.{}", self.flags.namespace)),
            "metadata": self.flags.node_metadata(),
            "userAgentName": "strata",
            "userAgentBuildVersion": {
                "version": { "majorNumber": version(0), "minorNumber": version(1), "patch": version(2) },
                "metadata": { "build.label": "strata" },
            },
        })
    }

    /// There is no bootstrap file; this says what one would.
    fn bootstrap(&self) -> Value {
        let mut out = json!({ "node": self.node() });
        if let Some(addr) = self.flags.admin_addr {
            let socket = json!({ "address": addr.ip().to_string(), "portValue": addr.port() });
            out["admin"] = json!({ "address": { "socketAddress": socket } });
        }
        out
    }

    fn server_state(&self) -> &'static str {
        if self.readiness.pending().is_empty() { "LIVE" } else { "INITIALIZING" }
    }

    fn server_info(&self) -> Value {
        let uptime = format!("{}s", self.started.elapsed().as_secs());
        json!({
            "version": format!("strata/{}", env!("CARGO_PKG_VERSION")),
            "state": self.server_state(),
            "uptimeCurrentEpoch": uptime,
            "uptimeAllEpochs": uptime,
            "commandLineOptions": { "concurrency": self.flags.concurrency, "serviceNode": self.flags.node_id() },
            "node": self.node(),
        })
    }
}

fn section(name: &str, field: &str, content: Value) -> Value {
    json!({ "@type": format!("{ADMIN}{name}"), field: content })
}

fn body(type_url: &str, version: &Version) -> Value {
    proto_json::any(type_url, &version.body).unwrap_or_else(|error| {
        tracing::warn!(%error, "a resource cannot be shown");
        json!({ "@type": type_url })
    })
}

fn date(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}

/// A resource in the shape all of Envoy's sections but the listeners' have.
fn dynamic(field: &str, type_url: &str, entry: &Entry) -> Value {
    let mut out = Map::new();
    if let Some(version) = &entry.accepted {
        out.insert("versionInfo".to_owned(), json!(version.name));
        out.insert("lastUpdated".to_owned(), json!(date(version.at)));
        out.insert(field.to_owned(), body(type_url, version));
    }
    error_state(&mut out, type_url, entry);
    out.into()
}

fn listener(name: &str, entry: &Entry) -> Value {
    let mut out = Map::from_iter([("name".to_owned(), json!(name))]);
    if let Some(version) = &entry.accepted {
        let shown = body(type_url::LISTENER, version);
        let state = json!({ "versionInfo": version.name, "lastUpdated": date(version.at), "listener": shown });
        out.insert("activeState".to_owned(), state);
    }
    error_state(&mut out, type_url::LISTENER, entry);
    out.into()
}

fn error_state(out: &mut Map<String, Value>, type_url: &str, entry: &Entry) {
    if let Some((version, reason)) = &entry.refused {
        let state = json!({
            "failedConfiguration": body(type_url, version),
            "lastUpdateAttempt": date(version.at),
            "details": reason,
            "versionInfo": version.name,
        });
        out.insert("errorState".to_owned(), state);
    }
}

/// Route tables inside the listeners' connection managers: istiod sends a waypoint no others (xds-contract 1.5).
fn inline_routes(shown: &Value, version: &Version, routes: &mut Vec<Value>) {
    match shown {
        Value::Object(fields) => {
            if fields.get("@type").is_some_and(|found| found == HCM)
                && let Some(Value::Object(table)) = fields.get("routeConfig")
            {
                let mut with_type = Map::from_iter([("@type".to_owned(), json!(type_url::ROUTE))]);
                with_type.extend(table.clone());
                routes.push(json!({ "routeConfig": with_type, "lastUpdated": date(version.at) }));
                return;
            }
            fields.values().for_each(|value| inline_routes(value, version, routes));
        }
        Value::Array(items) => items.iter().for_each(|value| inline_routes(value, version, routes)),
        _ => {}
    }
}

/// Our certificate as Envoy's secret `default`, what peers are trusted by as `ROOTCA`. No key.
fn secrets(certificates: &[CertificateStatus]) -> Value {
    let pem = |list: &[l7_identity::CertificateInfo]| {
        let text: Vec<u8> = list.iter().filter_map(|info| STANDARD.decode(&info.pem).ok()).flatten().collect();
        STANDARD.encode(text)
    };
    let secret = |name: &str, at: &str, field: &str, content: Value| {
        let secret = json!({ "@type": type_url::SECRET, "name": name, field: content });
        json!({ "name": name, "lastUpdated": at, "secret": secret })
    };
    let mut out = Vec::new();
    for certificate in certificates {
        let Some(leaf) = certificate.cert_chain.first() else { continue };
        let chain = json!({
            "certificateChain": { "inlineBytes": pem(&certificate.cert_chain) },
            "privateKey": { "inlineBytes": STANDARD.encode("[redacted]") },
        });
        out.push(secret("default", &leaf.valid_from, "tlsCertificate", chain));
        let roots = json!({ "trustedCa": { "inlineBytes": pem(&certificate.root_certs) } });
        out.push(secret("ROOTCA", &leaf.valid_from, "validationContext", roots));
    }
    out.into()
}

fn certs(certificates: &[CertificateStatus]) -> Value {
    let one = |info: &l7_identity::CertificateInfo, uri: Option<&str>| {
        let days = OffsetDateTime::parse(&info.expiration_time, &Rfc3339)
            .map_or(0, |end| (end - OffsetDateTime::now_utc()).whole_days().max(0));
        let names: Vec<_> = uri.into_iter().map(|uri| json!({ "uri": uri })).collect();
        json!({
            "path": "<inline>",
            "serialNumber": info.serial_number,
            "subjectAltNames": names,
            "daysUntilExpiration": days.to_string(),
            "validFrom": info.valid_from,
            "expirationTime": info.expiration_time,
        })
    };
    let list: Vec<_> = certificates
        .iter()
        .map(|certificate| {
            let chain = certificate.cert_chain.iter().enumerate();
            let uri = |index: usize| (index == 0).then_some(certificate.identity.as_str());
            json!({
                "caCert": certificate.root_certs.iter().map(|info| one(info, None)).collect::<Vec<_>>(),
                "certChain": chain.map(|(index, info)| one(info, uri(index))).collect::<Vec<_>>(),
            })
        })
        .collect();
    json!({ "certificates": list })
}

/// `envoy.admin.v3.Clusters`, or a line for each endpoint.
fn clusters(held: &Held, query: &str) -> Reply {
    let mut statuses = Vec::new();
    for (name, entry) in held.of(type_url::CLUSTER) {
        let Some(version) = &entry.accepted else { continue };
        let cluster = body(type_url::CLUSTER, version);
        let eds = cluster["edsClusterConfig"]["serviceName"].as_str().unwrap_or(name);
        let assigned =
            held.of(type_url::ENDPOINT).find(|(found, _)| *found == eds).and_then(|(_, e)| e.accepted.as_ref());
        let assignment =
            assigned.map_or_else(|| cluster["loadAssignment"].clone(), |version| body(type_url::ENDPOINT, version));
        statuses.push(json!({
            "name": name,
            "addedViaApi": true,
            "hostStatuses": hosts(&assignment),
        }));
    }
    if asks_for_json(query) {
        return Reply::Json(json!({ "clusterStatuses": statuses }));
    }
    let mut text = String::new();
    for cluster in &statuses {
        let name = cluster["name"].as_str().unwrap_or_default();
        text += &format!("{name}::added_via_api::true\n");
        for host in cluster["hostStatuses"].as_array().into_iter().flatten() {
            let health = host["healthStatus"]["edsHealthStatus"].as_str().unwrap_or_default();
            text += &format!("{name}::{}::health_flags::{health}\n", written(&host["address"]));
        }
    }
    Reply::Text(text)
}

fn hosts(assignment: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    for locality in assignment["endpoints"].as_array().into_iter().flatten() {
        for endpoint in locality["lbEndpoints"].as_array().into_iter().flatten() {
            let health = endpoint["healthStatus"].as_str().filter(|status| *status != "UNKNOWN").unwrap_or("HEALTHY");
            let mut host = json!({
                "address": endpoint["endpoint"]["address"],
                "healthStatus": { "edsHealthStatus": health },
                "weight": endpoint["loadBalancingWeight"].as_u64().unwrap_or(1),
            });
            if locality["locality"].is_object() {
                host["locality"] = locality["locality"].clone();
            }
            out.push(host);
        }
    }
    out
}

/// `envoy.admin.v3.Listeners`, or a line for each.
fn listeners(held: &Held, query: &str) -> Reply {
    let list: Vec<_> = held
        .of(type_url::LISTENER)
        .filter_map(|(name, entry)| Some((name, body(type_url::LISTENER, entry.accepted.as_ref()?))))
        .collect();
    if asks_for_json(query) {
        let statuses: Vec<_> =
            list.iter().map(|(name, shown)| json!({ "name": name, "localAddress": shown["address"] })).collect();
        return Reply::Json(json!({ "listenerStatuses": statuses }));
    }
    Reply::Text(list.iter().map(|(name, shown)| format!("{name}::{}\n", written(&shown["address"]))).collect())
}

fn asks_for_json(query: &str) -> bool {
    query.split('&').any(|pair| pair == "format=json")
}

/// An `envoy.config.core.v3.Address` as Envoy writes it.
fn written(address: &Value) -> String {
    let socket = &address["socketAddress"];
    if let Some(host) = socket["address"].as_str() {
        return format!("{host}:{}", socket["portValue"]);
    }
    let internal = &address["envoyInternalAddress"];
    match (internal["serverListenerName"].as_str(), internal["endpointId"].as_str()) {
        (Some(listener), Some(endpoint)) => format!("envoy://{listener}/{endpoint}"),
        (Some(listener), None) => format!("envoy://{listener}"),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests;
