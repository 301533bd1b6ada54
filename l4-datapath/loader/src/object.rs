//! The embedded kernel object: maps created or reused, programs verified and loaded.
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError},
};
use strata_abi::{Addr, names};

use crate::{Error, PodLookup, sys};

/// The object as built by `integration/scripts/build-bpf.sh`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("STRATA_BPF_OBJECT"));

/// The ELF object with all programs, as embedded at build time.
pub fn object_bytes() -> &'static [u8] {
    OBJECT
}

/// Programs that are loaded once; `sk_lookup` is loaded for each pod.
const PROGRAMS: [&str; 14] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "dns_connect4",
    "dns_connect6",
    "dns_sendmsg4",
    "dns_sendmsg6",
    "from_pod",
    "to_pod",
];

/// The `sk_lookup` program.
const POD_LOOKUP: &str = "pod_lookup";

/// Loaded programs by name.
#[derive(Debug)]
pub(crate) struct Programs {
    programs: BTreeMap<String, OwnedFd>,
    instruction_counts: BTreeMap<String, u32>,
}

impl Programs {
    pub(crate) fn get(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        match self.programs.get(name) {
            Some(program) => Ok(program.as_fd()),
            None => Err(Error::Missing { what: "program", name: name.into() }),
        }
    }

    pub(crate) fn instruction_counts(&self) -> &BTreeMap<String, u32> {
        &self.instruction_counts
    }
}

/// Loads everything that is one a node. `sk_lookup` is verified too (with no pod), so that a
/// program the kernel refuses is known at start and not at the first enrolment.
/// `errno`: see [`crate::Features`].
pub(crate) fn load_all(dir: &Path, errno: bool) -> Result<Programs, Error> {
    let none = PodLookup { pod_index: u32::MAX, v4: None, v6: None, netns_cookie: 0, security_id: 0 };
    let mut object = load_object(dir, &none, errno)?;
    let mut loaded = Programs { programs: BTreeMap::new(), instruction_counts: BTreeMap::new() };
    for name in PROGRAMS.into_iter().chain([POD_LOOKUP]) {
        let (fd, instructions) = load_program(&mut object, name)?;
        loaded.programs.insert(name.into(), fd);
        loaded.instruction_counts.insert(name.into(), instructions);
    }
    Ok(loaded)
}

/// A pod's own instance of `sk_lookup`: the kernel gives that hook no way to tell namespaces apart.
pub(crate) fn load_sk_lookup(dir: &Path, pod: &PodLookup, errno: bool) -> Result<OwnedFd, Error> {
    let mut object = load_object(dir, pod, errno)?;
    load_program(&mut object, POD_LOOKUP).map(|(fd, _)| fd)
}

fn load_object(dir: &Path, pod: &PodLookup, errno: bool) -> Result<Ebpf, Error> {
    check_shapes(dir)?;
    let v4 = pod.v4.map_or(Addr::UNSPECIFIED, |ip| Addr::v4(ip.octets())).words();
    let v6 = pod.v6.map_or(Addr::UNSPECIFIED, |ip| Addr::v6(ip.octets())).words();
    let has_errno = u32::from(errno);
    // Whoever loads is in the node's own namespace.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let socket = socket.map_err(|source| Error::Path { action: "open", path: "a socket".into(), source })?;
    let node = crate::netns_cookie(socket.as_fd())?;
    let mut loader = EbpfLoader::new();
    // No CO-RE relocations in our programs: parsing the kernel's types would only cost time, at every pod.
    loader.btf(None);
    for name in names::ALL {
        loader.map_pin_path(name, dir.join(name));
    }
    loader
        .override_global("HAS_ERRNO", &has_errno, true)
        .override_global("NODE_NETNS_COOKIE", &node, true)
        .override_global("POD_INDEX", &pod.pod_index, true)
        .override_global("POD_V4", &v4, true)
        .override_global("POD_V6", &v6, true)
        .override_global("POD_NETNS_COOKIE", &pod.netns_cookie, true)
        .override_global("POD_SECURITY_ID", &pod.security_id, true);
    loader.load(OBJECT).map_err(|source| Error::Object { source: Box::new(source) })
}

/// How often a load that a signal interrupted is begun again.
const LOAD_ATTEMPTS: u32 = 5;

fn is_interrupted(error: &ProgramError) -> bool {
    match error {
        ProgramError::LoadError { io_error, .. } => io_error.raw_os_error() == Some(libc::EAGAIN),
        _ => false,
    }
}

fn load_program(object: &mut Ebpf, name: &str) -> Result<(OwnedFd, u32), Error> {
    let fail = |source| Error::Program { program: name.into(), source: Box::new(source) };
    let Some(program) = object.program_mut(name) else {
        return Err(Error::Missing { what: "program", name: name.into() });
    };
    let mut attempts = 0;
    loop {
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => return Err(Error::Missing { what: "program of a known type", name: name.into() }),
        };
        match loaded {
            Ok(()) => break,
            // The verifier gives up when a signal waits for the thread (EAGAIN, bpf_check); libbpf asks again as well.
            Err(error) if attempts < LOAD_ATTEMPTS && is_interrupted(&error) => attempts += 1,
            Err(error) => return Err(fail(error)),
        }
    }
    let fd = program.fd().map_err(fail)?.as_fd().try_clone_to_owned();
    let fd = fd.map_err(|source| fail(ProgramError::IOError(source)))?;
    let instructions = program.info().map_err(fail)?.verified_instruction_count().unwrap_or(0);
    Ok((fd, instructions))
}

/// The kernel reuses a pinned map whatever it looks like; a map of another shape would be silently
/// misread. Compared with what the object says.
fn check_shapes(dir: &Path) -> Result<(), Error> {
    let object = aya_obj_maps()?;
    for name in names::ALL {
        let path = dir.join(name);
        let Ok(pinned) = sys::obj_get(&path) else { continue };
        let found =
            sys::map_info(pinned.as_fd()).map_err(|source| Error::Map { map: name, operation: "info", source })?;
        let Some(expected) = object.get(name) else {
            return Err(Error::Missing { what: "map", name: name.into() });
        };
        let found = Shape::from(found);
        if found != *expected {
            return Err(Error::MapShape { map: name, path, found: found.to_string(), expected: expected.to_string() });
        }
    }
    Ok(())
}

/// What must be equal for a pinned map to be reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shape {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

impl From<sys::MapInfo> for Shape {
    fn from(info: sys::MapInfo) -> Shape {
        Shape {
            kind: info.kind,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.map_flags & !BPF_F_MMAPABLE,
        }
    }
}

/// aya or the kernel may add it to arrays; it changes nothing for the programs.
const BPF_F_MMAPABLE: u32 = 1 << 10;

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shape { kind, key_size, value_size, max_entries, flags } = self;
        write!(f, "type {kind}, key {key_size}, value {value_size}, {max_entries} entries, flags {flags:#x}")
    }
}

/// The maps the object defines.
fn aya_obj_maps() -> Result<BTreeMap<String, Shape>, Error> {
    let object = aya_obj::Object::parse(OBJECT)
        .map_err(|source| Error::Object { source: Box::new(aya::EbpfError::ParseError(source)) })?;
    let shapes = object.maps.iter().map(|(name, map)| {
        let shape = Shape {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags() & !BPF_F_MMAPABLE,
        };
        (name.clone(), shape)
    });
    Ok(shapes.collect())
}
