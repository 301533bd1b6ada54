//! The table's text, for `nft -f`.
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use l4_lb::{Outside, Published};
use strata_abi::proto;

use crate::Edge;

/// Name of the table, in family `inet`.
pub(crate) const TABLE: &str = "strata";

impl Edge {
    /// The whole table, in the place of the one there is.
    #[must_use]
    pub fn ruleset(&self) -> String {
        // Named first, so that there is one to delete.
        let mut text = format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
        self.sets(&mut text);
        self.untracked(&mut text);
        self.arriving(&mut text);
        self.leaving(&mut text);
        text.push_str("}\n");
        text
    }

    fn sets(&self, text: &mut String) {
        let ranges = |of: &BTreeSet<IpNet>| -> Vec<IpNet> { of.iter().copied().collect() };
        let addresses = |of: &BTreeSet<IpAddr>| -> Vec<IpNet> { of.iter().copied().map(IpNet::from).collect() };
        let (pods, own_pods) = (ranges(&self.pods), ranges(&self.own_pods));
        let known = [pods.clone(), addresses(&self.nodes), ranges(&self.except)].concat();
        for (name, ranges) in
            [("pods", pods), ("own_pods", own_pods), ("own", addresses(&self.own_addresses)), ("known", known)]
        {
            for v6 in [false, true] {
                let family = if v6 { "ipv6_addr" } else { "ipv4_addr" };
                let listed: Vec<String> =
                    ranges.iter().filter(|range| range.addr().is_ipv6() == v6).map(IpNet::to_string).collect();
                let (number, elements) = (if v6 { 6 } else { 4 }, elements(&listed));
                push(
                    text,
                    format!("\tset {name}{number} {{ type {family}; flags interval; auto-merge{elements}\n\t}}"),
                );
            }
        }
    }

    /// What needs no translation is not tracked: between pods, and between the node and its own pods.
    fn untracked(&self, text: &mut String) {
        let rules = "\t\tip saddr @pods4 ip daddr @pods4 notrack\n\t\tip6 saddr @pods6 ip6 daddr @pods6 notrack\n\
                     \t\tip saddr @own_pods4 ip daddr @own4 notrack\n\t\tip6 saddr @own_pods6 ip6 daddr @own6 notrack\n\
                     \t\tip saddr @own4 ip daddr @own_pods4 notrack\n\t\tip6 saddr @own6 ip6 daddr @own_pods6 notrack";
        for hook in ["prerouting", "output"] {
            push(text, format!("\tchain untracked_{hook} {{\n\t\ttype filter hook {hook} priority raw\n{rules}\n\t}}"));
        }
    }

    fn arriving(&self, text: &mut String) {
        for (number, (published, outside)) in self.published.iter().enumerate() {
            publish(text, number, published, outside);
        }
        for (name, key) in [
            ("ports4", "inet_proto . inet_service"),
            ("ports6", "inet_proto . inet_service"),
            ("addresses4", "ipv4_addr . inet_proto . inet_service"),
            ("addresses6", "ipv6_addr . inet_proto . inet_service"),
        ] {
            let listed: Vec<String> = self
                .published
                .keys()
                .enumerate()
                .filter(|(_, published)| name == map_of(published))
                .map(|(number, published)| {
                    let address = published.address.map(|address| format!("{address} . ")).unwrap_or_default();
                    format!("{address}{} . {} : goto p{number}", protocol(published.proto), published.port)
                })
                .collect();
            let elements = elements(&listed);
            push(text, format!("\tmap {name} {{ type {key} : verdict{elements}\n\t}}"));
        }
        // Pods reach all this by the socket: translated here, answers between pods would come past the translation.
        text.push_str(
            "\tchain arriving {\n\t\ttype nat hook prerouting priority dstnat\n\
             \t\tip saddr @pods4 accept\n\t\tip6 saddr @pods6 accept\n\
             \t\tip daddr . meta l4proto . th dport vmap @addresses4\n\
             \t\tip6 daddr . meta l4proto . th dport vmap @addresses6\n\
             \t\tmeta nfproto ipv4 fib daddr type local meta l4proto . th dport vmap @ports4\n\
             \t\tmeta nfproto ipv6 fib daddr type local meta l4proto . th dport vmap @ports6\n\t}\n",
        );
    }

    fn leaving(&self, text: &mut String) {
        text.push_str("\tchain leaving {\n\t\ttype nat hook postrouting priority srcnat\n");
        if self.masquerade {
            text.push_str(
                "\t\tip saddr @own_pods4 ip daddr != @known4 masquerade\n\
                 \t\tip6 saddr @own_pods6 ip6 daddr != @known6 masquerade\n",
            );
        }
        // A caller sent on to another node: the answer must come back this way. To pods of this node callers come with
        // their own address, which is what policy judges.
        text.push_str(
            "\t\tct status dnat meta nfproto ipv4 ip daddr != @own_pods4 fib daddr type != local masquerade\n\
             \t\tct status dnat meta nfproto ipv6 ip6 daddr != @own_pods6 fib daddr type != local masquerade\n\t}\n",
        );
    }
}

fn push(text: &mut String, lines: String) {
    text.push_str(&lines);
    text.push('\n');
}

/// An empty list is a syntax error.
fn elements(listed: &[String]) -> String {
    if listed.is_empty() { String::new() } else { format!("; elements = {{ {} }}", listed.join(", ")) }
}

fn map_of(published: &Published) -> &'static str {
    match (published.address.is_some(), published.v6) {
        (false, false) => "ports4",
        (false, true) => "ports6",
        (true, false) => "addresses4",
        (true, true) => "addresses6",
    }
}

fn protocol(number: u8) -> &'static str {
    if number == proto::UDP { "udp" } else { "tcp" }
}

fn publish(text: &mut String, number: usize, published: &Published, outside: &Outside) {
    let family = if published.v6 { "ip6" } else { "ip" };
    let _written = writeln!(text, "\tchain p{number} {{");
    if !outside.sources.is_empty() {
        let ranges: Vec<String> = outside.sources.iter().map(IpNet::to_string).collect();
        let _written = writeln!(text, "\t\t{family} saddr != {{ {} }} drop", ranges.join(", "));
    }
    let choice = if outside.sticky { format!("jhash {family} saddr") } else { "numgen random".to_owned() };
    let backends: Vec<String> = outside.backends.iter().enumerate().map(backend).collect();
    let _written = writeln!(
        text,
        "\t\tmeta l4proto {} dnat {family} addr . port to {choice} mod {} map {{ {} }} comment \"{}\"\n\t}}",
        protocol(published.proto),
        outside.backends.len(),
        backends.join(", "),
        outside.name,
    );
}

fn backend((slot, backend): (usize, &SocketAddr)) -> String {
    format!("{slot} : {} . {}", backend.ip(), backend.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_node() {
        let nets = |text: &[&str]| text.iter().map(|range| range.parse().unwrap()).collect();
        let ips = |text: &[&str]| text.iter().map(|ip| ip.parse().unwrap()).collect();
        let answer = |backends: &[&str], sticky, sources: &[&str]| Outside {
            name: "shop/web:http".into(),
            backends: backends.iter().map(|backend| backend.parse().unwrap()).collect(),
            sticky,
            sources: sources.iter().map(|range| range.parse().unwrap()).collect(),
        };
        let at = |address: Option<&str>, v6, proto, port| Published {
            address: address.map(|address| address.parse().unwrap()),
            v6,
            proto,
            port,
        };
        let edge = Edge {
            pods: nets(&["10.8.0.0/24", "10.8.1.0/24", "fd00:8::/64"]),
            own_pods: nets(&["10.8.0.0/24", "fd00:8::/64"]),
            nodes: ips(&["10.9.0.1", "10.9.0.2"]),
            own_addresses: ips(&["10.9.0.1"]),
            masquerade: true,
            except: nets(&["172.16.0.0/12"]),
            published: [
                (at(None, false, proto::TCP, 30080), answer(&["10.8.0.3:8080", "10.8.1.3:8080"], false, &[])),
                (at(None, true, proto::UDP, 30053), answer(&["[fd00:8::3]:53"], true, &[])),
                (
                    at(Some("203.0.113.9"), false, proto::TCP, 80),
                    answer(&["10.8.0.3:8080"], false, &["198.51.100.0/24"]),
                ),
            ]
            .into(),
        };
        insta::assert_snapshot!(edge.ruleset());
    }

    #[test]
    fn nothing_known_makes_a_table_that_does_nothing() {
        let text = Edge::default().ruleset();
        assert!(!text.contains("elements") && !text.contains("@known4 masquerade"), "{text}");
    }
}
