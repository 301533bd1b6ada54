//! Virtual addresses for the hosts of ServiceEntries that give none: without one nobody could be led to them. They are of
//! istiod's ranges and, as with istiod, kept in the objects' status.
use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use compat_objects::istio::{Resolution, ServiceEntry};
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet};

/// Hosts there is room for: 240.240.0.0/16 without its first and last; the numbers in 2001:2::/48 are the same.
const ROOM: u64 = 65_534;
/// Says no, where its value is `false`.
const LABEL: &str = "networking.istio.io/enable-autoallocate-ip";

/// By ServiceEntry, in the order of its hosts.
#[derive(Debug, Default)]
pub(crate) struct Drawn(pub(crate) BTreeMap<ObjectKey, Vec<(String, IpAddr)>>);

impl Drawn {
    /// Those that are kept first; the others get what a hash of their names says, or the next that is free, so that the same objects
    /// get the same addresses even where nobody keeps them.
    pub(crate) fn draw(objects: &ObjectSet) -> Self {
        let wanting = || objects.service_entries().filter(|entry| wants(entry));
        let mut drawn = BTreeMap::new();
        let mut taken: HashSet<IpAddr> = given(objects).collect();
        for entry in wanting() {
            let kept: Vec<_> = kept(entry).filter(|(_, address)| taken.insert(*address)).collect();
            drawn.insert(ObjectKey::new(Kind::ServiceEntry, entry.namespace(), entry.name()), kept);
        }
        for entry in wanting() {
            let key = ObjectKey::new(Kind::ServiceEntry, entry.namespace(), entry.name());
            let kept = drawn.remove(&key).unwrap_or_default();
            let mut all = Vec::new();
            for host in &entry.spec.hosts {
                let of_host: Vec<_> = kept.iter().filter(|(of, _)| of == host).cloned().collect();
                if of_host.is_empty() {
                    let free = free(&taken, &format!("{}/{}/{host}", key.namespace, key.name));
                    taken.extend(free.iter().flatten());
                    all.extend(free.into_iter().flatten().map(|address| (host.clone(), address)));
                } else {
                    all.extend(of_host);
                }
            }
            drawn.insert(key, all);
        }
        Self(drawn)
    }

    pub(crate) fn of<'d>(&'d self, entry: &ObjectKey, host: &'d str) -> impl Iterator<Item = IpAddr> + 'd {
        let all = self.0.get(entry).into_iter().flatten();
        all.filter(move |(of, _)| of == host).map(|(_, address)| *address)
    }
}

fn wants(entry: &ServiceEntry) -> bool {
    let spec = &entry.spec;
    let reachable = match spec.resolution {
        Resolution::None => false,
        Resolution::DynamicDns => true,
        _ => !spec.hosts.iter().any(|host| host.starts_with('*')),
    };
    reachable && spec.addresses.is_empty() && entry.label(LABEL) != Some("false")
}

/// Those that people chose themselves.
fn given(objects: &ObjectSet) -> impl Iterator<Item = IpAddr> + '_ {
    objects.service_entries().flat_map(|entry| entry.spec.addresses.iter().filter_map(|address| address.parse().ok()))
}

/// Those in the status.
fn kept(entry: &ServiceEntry) -> impl Iterator<Item = (String, IpAddr)> + '_ {
    let listed = entry.status.as_ref().and_then(|status| status.get("addresses")?.as_array());
    listed.into_iter().flatten().filter_map(|address| {
        let text = |field: &str| address.get(field)?.as_str();
        Some((text("host")?.to_owned(), text("value")?.parse().ok()?))
    })
}

/// One of each family; none if all are taken.
fn free(taken: &HashSet<IpAddr>, name: &str) -> Option<[IpAddr; 2]> {
    let first = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
    (0..ROOM)
        .map(|step| addresses(first.wrapping_add(step) % ROOM + 1))
        .find(|pair| pair.iter().all(|address| !taken.contains(address)))
}

fn addresses(number: u64) -> [IpAddr; 2] {
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    let [high, low] = number.to_be_bytes();
    [Ipv4Addr::new(240, 240, high, low).into(), Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, number).into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(text: &str) -> ObjectSet {
        let (objects, faults) = compat_objects::read_str(text, std::path::Path::new("test.yaml"));
        assert!(faults.is_empty(), "{faults:?}");
        objects
    }

    fn entry(name: &str, rest: &str) -> String {
        format!(
            "
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: a}}
spec: {{hosts: [{name}.example], resolution: DNS, ports: [{{number: 80, name: http, protocol: HTTP}}]}}
{rest}"
        )
    }

    fn of(drawn: &Drawn, name: &str) -> Vec<String> {
        let key = ObjectKey::new(Kind::ServiceEntry, "a", name);
        let host = format!("{name}.example");
        drawn.of(&key, &host).map(|address| address.to_string()).collect()
    }

    #[test]
    fn what_is_kept_stays_and_others_get_what_is_free() {
        let alone = Drawn::draw(&entries(&entry("one", "")));
        let [v4, v6] = of(&alone, "one").try_into().unwrap();
        assert!(v4.starts_with("240.240.") && v6.starts_with("2001:2::"), "{v4} {v6}");
        // Somebody else keeps just those.
        let kept = format!(
            "status: {{addresses: [{{host: two.example, value: {v4}}}, {{host: two.example, value: '{v6}'}}]}}"
        );
        let both = Drawn::draw(&entries(&(entry("one", "") + &entry("two", &kept))));
        assert_eq!(of(&both, "two"), [v4.clone(), v6]);
        let others = of(&both, "one");
        assert!(others.len() == 2 && others[0] != v4, "{others:?}");
        assert_eq!(of(&Drawn::draw(&entries(&entry("one", ""))), "one")[0], v4, "the same again");
    }

    #[test]
    fn who_has_addresses_or_wants_none_gets_none() {
        let text = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: given, namespace: a}
spec: {hosts: [given.example], addresses: [10.0.0.1], resolution: DNS, ports: [{number: 80, name: http}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: passed, namespace: a}
spec: {hosts: ['*.passed.example'], resolution: NONE, ports: [{number: 80, name: http}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: refused, namespace: a, labels: {networking.istio.io/enable-autoallocate-ip: 'false'}}
spec: {hosts: [refused.example], resolution: DNS, ports: [{number: 80, name: http}]}
";
        assert!(Drawn::draw(&entries(text)).0.is_empty());
    }
}
