//! Typed handles of every map: plain reads and writes, dumps, and `sync` to a desired content.
use std::{
    collections::BTreeMap,
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use strata_abi::{
    Addr, AffinityEntry, AffinityKey, Backend, BackendKey, FlowKey, FlowState, Grant, GrantKey, Identity, ListenerKey,
    NodeConfig, Plain, PodRecord, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey, UdpPeerKey, VipRecord, names,
    stat,
};

use crate::{Error, sys};

/// What [`Table::sync`] changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: usize,
    pub changed: usize,
    pub removed: usize,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

/// A hash or LPM map. All methods take `&self`: the kernel serialises writers of one key.
#[derive(Debug)]
pub struct Table<K, V> {
    name: &'static str,
    fd: OwnedFd,
    max_entries: u32,
    _types: PhantomData<fn() -> (K, V)>,
}

impl<K: Plain, V: Plain> Table<K, V> {
    pub(crate) fn open(dir: &Path, name: &'static str) -> Result<Self, Error> {
        let fd = open(dir, name)?;
        let info = sys::map_info(fd.as_fd()).map_err(|source| Error::Map { map: name, operation: "info", source })?;
        check_size(name, "key", info.key_size, size_of::<K>())?;
        check_size(name, "value", info.value_size, size_of::<V>())?;
        Ok(Table { name, fd, max_entries: info.max_entries, _types: PhantomData })
    }

    /// The map's name, one of `strata_abi::names`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Most entries the map can hold.
    pub fn max_entries(&self) -> u32 {
        self.max_entries
    }

    fn error(&self, operation: &'static str, source: io::Error) -> Error {
        Error::Map { map: self.name, operation, source }
    }

    /// The value of exactly `key` (for an LPM map: of the longest prefix of `key`).
    pub fn get(&self, key: &K) -> Result<Option<V>, Error> {
        sys::lookup(self.fd.as_fd(), key).map_err(|e| self.error("lookup", e))
    }

    /// Inserts or replaces.
    pub fn insert(&self, key: &K, value: &V) -> Result<(), Error> {
        sys::update(self.fd.as_fd(), key, value).map_err(|error| match error.raw_os_error() {
            // Hash maps say E2BIG, tries ENOSPC.
            Some(libc::E2BIG | libc::ENOSPC) => Error::MapFull { map: self.name, max_entries: self.max_entries },
            _ => self.error("update", error),
        })
    }

    /// Removes; false if `key` was not there.
    pub fn remove(&self, key: &K) -> Result<bool, Error> {
        sys::delete(self.fd.as_fd(), key).map_err(|e| self.error("delete", e))
    }

    /// All keys. Entries that appear or vanish meanwhile may or may not be seen.
    pub fn keys(&self) -> Result<Vec<K>, Error> {
        let mut keys = Vec::new();
        let mut last = None;
        // A key removed while we walk makes the kernel start over: the bound keeps that from going on for ever.
        while keys.len() <= self.max_entries as usize {
            last = sys::next_key(self.fd.as_fd(), last.as_ref()).map_err(|e| self.error("next key", e))?;
            match last {
                Some(key) => keys.push(key),
                None => break,
            }
        }
        Ok(keys)
    }

    /// All entries, see [`Table::keys`].
    pub fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        let mut entries = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    /// Removes every entry; the number removed.
    pub fn clear(&self) -> Result<usize, Error> {
        let mut removed = 0;
        for key in self.keys()? {
            removed += usize::from(self.remove(&key)?);
        }
        Ok(removed)
    }
}

impl<K: Plain + Ord, V: Plain + PartialEq> Table<K, V> {
    /// The content as an ordered map.
    pub fn dump(&self) -> Result<BTreeMap<K, V>, Error> {
        Ok(self.entries()?.into_iter().collect())
    }

    /// Makes the content equal to `desired`: additions and changes first, then removals, so that at no
    /// moment something wanted is missing.
    pub fn sync(&self, desired: &BTreeMap<K, V>) -> Result<Changes, Error> {
        let mut changes = self.sync_upserts(desired)?;
        changes.removed = self.sync_removals(desired)?;
        Ok(changes)
    }

    /// The first half of [`Table::sync`]; for maps that depend on each other (backends before services).
    pub fn sync_upserts(&self, desired: &BTreeMap<K, V>) -> Result<Changes, Error> {
        let present = self.dump()?;
        let mut changes = Changes::default();
        for (key, value) in desired {
            match present.get(key) {
                Some(old) if old == value => continue,
                Some(_) => changes.changed += 1,
                None => changes.added += 1,
            }
            self.insert(key, value)?;
        }
        Ok(changes)
    }

    /// The second half of [`Table::sync`]; the number removed.
    pub fn sync_removals(&self, desired: &BTreeMap<K, V>) -> Result<usize, Error> {
        let mut removed = 0;
        for key in self.keys()? {
            if !desired.contains_key(&key) {
                removed += usize::from(self.remove(&key)?);
            }
        }
        Ok(removed)
    }
}

/// `LISTENERS`: listening sockets, kept by the kernel until they are closed or replaced.
#[derive(Debug)]
pub struct Listeners {
    fd: OwnedFd,
}

impl Listeners {
    /// Puts or swaps a listening TCP socket (any namespace). New connections see it at once.
    pub fn insert(&self, key: ListenerKey, socket: BorrowedFd<'_>) -> Result<(), Error> {
        sys::update(self.fd.as_fd(), &key, &(socket.as_raw_fd() as u32)).map_err(|e| Self::error("update", e))
    }

    /// Removes; false if there was none (a closed socket leaves by itself).
    pub fn remove(&self, key: ListenerKey) -> Result<bool, Error> {
        sys::delete(self.fd.as_fd(), &key).map_err(|e| Self::error("delete", e))
    }

    /// Removes every kind of a pod's listeners.
    pub fn remove_pod(&self, pod_index: u32) -> Result<(), Error> {
        (0..strata_abi::listener::COUNT).try_for_each(|kind| self.remove(ListenerKey { pod_index, kind }).map(drop))
    }

    /// Keys of the listeners that are alive.
    pub fn keys(&self) -> Result<Vec<ListenerKey>, Error> {
        let mut keys = Vec::new();
        let mut last = None;
        loop {
            last = sys::next_key(self.fd.as_fd(), last.as_ref()).map_err(|e| Self::error("next key", e))?;
            match last {
                Some(key) => keys.push(key),
                None => return Ok(keys),
            }
        }
    }

    fn error(operation: &'static str, source: io::Error) -> Error {
        Error::Map { map: names::LISTENERS, operation, source }
    }
}

/// `CONFIG`: the node's one record.
#[derive(Debug)]
pub struct Config {
    fd: OwnedFd,
}

impl Config {
    pub fn get(&self) -> Result<NodeConfig, Error> {
        let config = sys::lookup(self.fd.as_fd(), &0u32).map_err(|source| Error::Map {
            map: names::CONFIG,
            operation: "lookup",
            source,
        })?;
        Ok(config.unwrap_or_default())
    }

    pub fn set(&self, config: &NodeConfig) -> Result<(), Error> {
        sys::update(self.fd.as_fd(), &0u32, config).map_err(|source| Error::Map {
            map: names::CONFIG,
            operation: "update",
            source,
        })
    }

    /// Reads, changes, writes. The agent is the only writer, so nothing is lost between.
    pub fn update(&self, change: impl FnOnce(&mut NodeConfig)) -> Result<NodeConfig, Error> {
        let mut config = self.get()?;
        change(&mut config);
        self.set(&config)?;
        Ok(config)
    }
}

/// `STATS`: counters, monotonic while the pinned map lives.
#[derive(Debug)]
pub struct Counters {
    fd: OwnedFd,
    processors: usize,
}

impl Counters {
    /// The sum over all processors of counter `index` (`strata_abi::stat`).
    pub fn get(&self, index: u32) -> Result<u64, Error> {
        let values = sys::lookup_per_cpu(self.fd.as_fd(), &index, self.processors).map_err(|source| Error::Map {
            map: names::STATS,
            operation: "lookup",
            source,
        })?;
        Ok(values.iter().sum())
    }

    /// All counters, indexed as in `strata_abi::stat`.
    pub fn all(&self) -> Result<Vec<u64>, Error> {
        (0..stat::COUNT).map(|index| self.get(index)).collect()
    }
}

/// Every map of the datapath.
#[derive(Debug)]
pub struct Maps {
    /// Network-namespace cookie -> pod.
    pub pods: Table<u64, PodRecord>,
    /// Host-side ifindex -> pod.
    pub pods_by_ifindex: Table<u32, PodRecord>,
    /// Address prefix -> identity; `prefix_len` 0..=128, an IPv4 prefix is 96 + n.
    pub identities: Table<Prefix<Addr>, Identity>,
    pub services: Table<ServiceKey, Service>,
    pub backends: Table<BackendKey, Backend>,
    /// `prefix_len` counts the bits of `PolicyKey`: `PolicyKey::PREFIX_*`.
    pub policy: Table<Prefix<PolicyKey>, PolicyEntry>,
    pub listeners: Listeners,
    pub grants: Table<GrantKey, Grant>,
    pub config: Config,
    pub stats: Counters,
    /// Who opened which connection; written by the kernel programs.
    pub conntrack: Table<FlowKey, FlowState>,
    pub udp_peers: Table<UdpPeerKey, VipRecord>,
    pub affinity: Table<AffinityKey, AffinityEntry>,
    /// Resolvers in whose place the proxy answers meshed pods.
    pub resolvers: Table<Addr, u32>,
}

impl Maps {
    pub(crate) fn open(dir: &Path) -> Result<Maps, Error> {
        Ok(Maps {
            pods: Table::open(dir, names::PODS)?,
            pods_by_ifindex: Table::open(dir, names::PODS_BY_IFINDEX)?,
            identities: Table::open(dir, names::IDENTITIES)?,
            services: Table::open(dir, names::SERVICES)?,
            backends: Table::open(dir, names::BACKENDS)?,
            policy: Table::open(dir, names::POLICY)?,
            listeners: Listeners { fd: open(dir, names::LISTENERS)? },
            grants: Table::open(dir, names::GRANTS)?,
            config: Config { fd: open(dir, names::CONFIG)? },
            stats: Counters { fd: open(dir, names::STATS)?, processors: possible_processors()? },
            conntrack: Table::open(dir, names::CONNTRACK)?,
            udp_peers: Table::open(dir, names::UDP_PEERS)?,
            affinity: Table::open(dir, names::AFFINITY)?,
            resolvers: Table::open(dir, names::RESOLVERS)?,
        })
    }
}

fn open(dir: &Path, name: &'static str) -> Result<OwnedFd, Error> {
    let path = dir.join(name);
    sys::obj_get(&path).map_err(|source| Error::Path { action: "open the pinned map", path, source })
}

fn check_size(map: &'static str, part: &str, found: u32, expected: usize) -> Result<(), Error> {
    if found as usize == expected {
        return Ok(());
    }
    Err(Error::MapShape {
        map,
        path: map.into(),
        found: format!("a {part} of {found} bytes"),
        expected: format!("{expected}"),
    })
}

/// Per-CPU maps have a slot for every processor that could exist, not only those online.
fn possible_processors() -> Result<usize, Error> {
    let path = Path::new("/sys/devices/system/cpu/possible");
    let fail = |source| Error::Path { action: "read", path: path.into(), source };
    let text = std::fs::read_to_string(path).map_err(fail)?;
    // "0", "0-3" or "0,2-7": the highest number, plus one.
    let highest = text.trim().rsplit([',', '-']).next().and_then(|n| n.parse::<usize>().ok());
    highest.map(|n| n + 1).ok_or_else(|| fail(io::Error::other(format!("unexpected content {text:?}"))))
}
