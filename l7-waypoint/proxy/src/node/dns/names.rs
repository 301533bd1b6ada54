//! Which DNS queries are about the mesh, and their answers: the names of its services, as ztunnel knows them. A service
//! without an address of its own (headless, or reached where its name points) is left to the resolver.
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType, rdata};
use xds_model::wds::{Mesh, Service};

/// Seconds an answer may be kept; CoreDNS's for services, and ztunnel's.
const TTL: u32 = 30;
/// What a datagram may carry without being cut into pieces (dnsflagday.net/2020).
const MAX_PAYLOAD: u16 = 1232;

/// Whose names are asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker<'a> {
    pub namespace: &'a str,
    /// DNS domain of the cluster, `cluster.local`.
    pub cluster_domain: &'a str,
}

/// The answer to `query` if it is about a service of the mesh alone; `None` if the resolver is to be asked.
pub(crate) fn answer(mesh: &Mesh, asker: Asker<'_>, query: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(query).ok()?;
    let [question] = request.queries.as_slice() else { return None };
    let is_query = request.metadata.message_type == MessageType::Query && request.metadata.op_code == OpCode::Query;
    let wanted = question.query_type();
    if !is_query || question.query_class() != DNSClass::IN || !matches!(wanted, RecordType::A | RecordType::AAAA) {
        return None;
    }
    let found = find(mesh, asker, &question.name().to_ascii())?;
    let mut owner = question.name().clone();
    let mut response = reply(&request, ResponseCode::NoError);
    response.metadata.authoritative = true;
    if let Some(name) = found.instead {
        let target = Name::from_ascii(format!("{name}.")).ok()?;
        response.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(rdata::CNAME(target.clone()))));
        owner = target;
    }
    // Without an address of the family the answer is that there is none, not that there is no such name (RFC 2308).
    for ip in found.addresses {
        let data = match (ip, wanted) {
            (IpAddr::V4(v4), RecordType::A) => RData::A(v4.into()),
            (IpAddr::V6(v6), RecordType::AAAA) => RData::AAAA(v6.into()),
            _ => continue,
        };
        response.add_answer(Record::from_rdata(owner.clone(), TTL, data));
    }
    response.to_vec().ok()
}

/// What is said when no resolver has an answer (SERVFAIL); `None` for what is no query.
pub(crate) fn failure(query: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(query).ok()?;
    if request.metadata.message_type != MessageType::Query {
        return None;
    }
    reply(&request, ResponseCode::ServFail).to_vec().ok()
}

/// An empty answer to `request`.
fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    response.add_queries(request.queries.iter().cloned());
    // Who speaks EDNS is answered in it (RFC 6891 section 6.1.1).
    if request.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_PAYLOAD);
        response.set_edns(edns);
    }
    response
}

/// A service found by a name.
struct Found {
    addresses: Vec<IpAddr>,
    /// The name that was meant, where a search domain hid it.
    instead: Option<String>,
}

/// Looks for the name itself, then for what it is without one of the search domains of a pod's resolv.conf: with
/// `ndots:5` an outside name is tried in all of them first.
fn find(mesh: &Mesh, asker: Asker<'_>, name: &str) -> Option<Found> {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let Asker { namespace, cluster_domain } = asker;
    let in_cluster = without(&name, cluster_domain);
    let in_services = in_cluster.and_then(|name| without(name, "svc"));
    let in_namespace = in_services.and_then(|name| without(name, namespace));
    let meant = [in_namespace, in_services, in_cluster].into_iter().flatten().map(|name| (name, true));
    std::iter::once((name.as_str(), false)).chain(meant).find_map(|(name, stripped)| {
        let addresses = addresses(mesh, service(mesh, namespace, name)?);
        let instead = stripped.then(|| name.to_owned());
        (!addresses.is_empty()).then_some(Found { addresses, instead })
    })
}

/// What stands before `domain` in a name.
fn without<'n>(name: &'n str, domain: &str) -> Option<&'n str> {
    name.strip_suffix(domain)?.strip_suffix('.')
}

/// The service of a name: its own before one of a wildcard, the narrowest of those first.
fn service<'a>(mesh: &'a Mesh, namespace: &str, name: &str) -> Option<&'a Arc<Service>> {
    let mut parents = name.match_indices('.').map(|(dot, _)| format!("*{}", &name[dot..]));
    let by_wildcard = || parents.find_map(|name| mesh.service_by_hostname(&name, namespace));
    mesh.service_by_hostname(name, namespace).or_else(by_wildcard)
}

/// Its single addresses in this network; a range is no answer.
fn addresses(mesh: &Mesh, service: &Service) -> Vec<IpAddr> {
    let here = service.addresses.iter().filter(|address| address.network == mesh.config().network);
    here.map(|address| address.prefix)
        .filter(|prefix| prefix.prefix_len() == prefix.max_prefix_len())
        .map(|prefix| prefix.addr())
        .collect()
}

#[cfg(test)]
mod tests;
