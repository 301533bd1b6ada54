//! The maps, and their face towards the core. The loader pins each by its name and shares it between all instances.
use aya_ebpf::{
    btf_maps::SkStorage,
    helpers::{bpf_get_prandom_u32, generated::bpf_ktime_get_boot_ns},
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash, lpm_trie::Key},
};
use strata_abi::{
    Addr, AffinityEntry, AffinityKey, Backend, BackendKey, FlowKey, FlowState, FragmentKey, Grant, GrantKey, Identity,
    ListenerKey, NodeConfig, PodRecord, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey, Translation, UdpPeerKey,
    VipRecord, stat,
};
use strata_bpf_core::Maps;

/// `BPF_F_NO_PREALLOC`: memory by entries, not by size.
const SPARSE: u32 = 1;

#[map]
pub static PODS: HashMap<u64, PodRecord> = HashMap::with_max_entries(1024, SPARSE);
#[map]
pub static PODS_BY_IFINDEX: HashMap<u32, PodRecord> = HashMap::with_max_entries(1024, SPARSE);
#[map]
pub static IDENTITIES: LpmTrie<Addr, Identity> = LpmTrie::with_max_entries(262_144, 0);
#[map]
pub static SERVICES: HashMap<ServiceKey, Service> = HashMap::with_max_entries(65_536, SPARSE);
#[map]
pub static BACKENDS: HashMap<BackendKey, Backend> = HashMap::with_max_entries(524_288, SPARSE);
#[map]
pub static POLICY: LpmTrie<PolicyKey, PolicyEntry> = LpmTrie::with_max_entries(262_144, 0);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(8_192, 0);
#[map]
pub static GRANTS: HashMap<GrantKey, Grant> = HashMap::with_max_entries(65_536, SPARSE);
#[map]
pub static CONFIG: Array<NodeConfig> = Array::with_max_entries(1, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 21, 0);
#[map]
pub static STATS: PerCpuArray<u64> = PerCpuArray::with_max_entries(stat::COUNT, 0);
#[map]
pub static CONNTRACK: LruHashMap<FlowKey, FlowState> = LruHashMap::with_max_entries(65_536, 0);
#[btf_map]
pub static TRANSLATIONS: SkStorage<Translation> = SkStorage::new();
#[map]
pub static UDP_PEERS: LruHashMap<UdpPeerKey, VipRecord> = LruHashMap::with_max_entries(16_384, 0);
#[map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityEntry> = LruHashMap::with_max_entries(16_384, 0);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, u64> = LruHashMap::with_max_entries(4_096, 0);
#[map]
pub static RESOLVERS: HashMap<Addr, u32> = HashMap::with_max_entries(64, SPARSE);

/// Adds to a counter of this processor.
#[inline(always)]
pub fn count(index: u32, amount: u64) {
    if let Some(counter) = STATS.get_ptr_mut(index) {
        // SAFETY: a live element of this processor's array; programs do not nest on it mid-addition in a way that matters for a counter.
        unsafe { *counter = (*counter).wrapping_add(amount) };
    }
}

/// The maps as the core sees them.
pub struct Kernel;

impl Maps for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<&NodeConfig> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn identity(&self, address: &Prefix<Addr>) -> Option<&Identity> {
        IDENTITIES.get(Key::new(address.prefix_len, address.data))
    }

    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        // SAFETY (here and below): values are replaced whole by the agent; sparse hash elements are freed by RCU, after this program.
        unsafe { SERVICES.get(key) }
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<&Backend> {
        // SAFETY: as above.
        unsafe { BACKENDS.get(key) }
    }

    #[inline(always)]
    fn policy(&self, key: &Prefix<PolicyKey>) -> Option<&PolicyEntry> {
        POLICY.get(Key::new(key.prefix_len, key.data))
    }

    #[inline(always)]
    fn grant(&self, key: &GrantKey) -> Option<&Grant> {
        // SAFETY: as above.
        unsafe { GRANTS.get(key) }
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<&AffinityEntry> {
        // SAFETY: an LRU element may be reused under us; a mixed entry costs a client its binding, nothing else.
        unsafe { AFFINITY.get(key) }
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        let _ = AFFINITY.insert(key, entry, 0);
    }

    #[inline(always)]
    fn flow_seen(&self, key: &FlowKey) -> Option<u64> {
        // SAFETY: one word, read whole.
        unsafe { CONNTRACK.get(key) }.map(|state| state.seen_ns)
    }

    #[inline(always)]
    fn set_flow_seen(&self, key: &FlowKey, now_ns: u64) {
        let _ = CONNTRACK.insert(key, &FlowState { seen_ns: now_ns }, 0);
    }

    #[inline(always)]
    fn fragment_seen(&self, key: &FragmentKey) -> Option<u64> {
        // SAFETY: one word, read whole.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_fragment_seen(&self, key: &FragmentKey, now_ns: u64) {
        let _ = FRAGMENTS.insert(key, &now_ns, 0);
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no argument, no precondition.
        unsafe { bpf_ktime_get_boot_ns() }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no argument, no precondition.
        unsafe { bpf_get_prandom_u32() }
    }
}
