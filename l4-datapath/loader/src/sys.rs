//! The `bpf(2)` system call for what aya has no interface for: links created, pinned, read back and replaced in
//! place, and map elements as plain bytes. Layouts as in the kernel's `include/uapi/linux/bpf.h`.
use std::{
    ffi::CString,
    io,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use strata_abi::Plain;

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// `bpf_attr` of the map element commands.
#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr` of `BPF_OBJ_PIN` and `BPF_OBJ_GET`.
#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `bpf_attr` of `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct Info {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `bpf_attr` of `BPF_LINK_CREATE`, with the tail that tcx reads.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    /// A cgroup or namespace descriptor, or an interface index.
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    _pad: u32,
    expected_revision: u64,
}

/// `bpf_attr` of `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `struct bpf_map_info`, as far as it is compared.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
}
// SAFETY: six u32, no padding.
unsafe impl Plain for MapInfo {}

/// `struct bpf_link_info`: the common head and the first words of the union.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) prog_id: u32,
    _pad: u32,
    /// cgroup: the cgroup's id. netns: inode and attach type. tcx: interface index and attach type.
    pub(crate) target: [u32; 4],
}
// SAFETY: eight u32, no padding.
unsafe impl Plain for LinkInfo {}

impl LinkInfo {
    pub(crate) fn cgroup_id(&self) -> u64 {
        u64::from(self.target[0]) | u64::from(self.target[1]) << 32
    }

    /// Interface index of a tcx link, 0 after the interface is gone; inode of a namespace link, 0 likewise.
    pub(crate) fn ifindex_or_netns(&self) -> u32 {
        self.target[0]
    }
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, fully initialised repr(C) prefix of bpf_attr whose size is passed; the pointers in it are
    // made from references that outlive the call by the functions below.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_fd(result: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel just returned this descriptor to us and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn element<K>(map: BorrowedFd<'_>, key: Option<&K>, value: u64, flags: u64) -> Element {
    Element { map_fd: number(map), _pad: 0, key: key.map_or(0, |k| std::ptr::from_ref(k) as u64), value, flags }
}

/// The value of `key`, None if there is none.
pub(crate) fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = element::<K>(map, Some(key), value.as_mut_ptr() as u64, 0);
    match bpf(MAP_LOOKUP_ELEM, &mut attr) {
        // SAFETY: zeroed first and filled by the kernel; `Plain` has no invalid bit pattern.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The values of all processors for `key` of a per-CPU map; `slots` is the number of possible processors.
pub(crate) fn lookup_per_cpu(map: BorrowedFd<'_>, key: &u32, slots: usize) -> io::Result<Vec<u64>> {
    let mut values = vec![0u64; slots];
    let mut attr = element::<u32>(map, Some(key), values.as_mut_ptr() as u64, 0);
    bpf(MAP_LOOKUP_ELEM, &mut attr).map(|_| values)
}

pub(crate) fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = element::<K>(map, Some(key), std::ptr::from_ref(value) as u64, 0);
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Deletes `key`; false if it was not there.
pub(crate) fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = element::<K>(map, Some(key), 0, 0);
    match bpf(MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The key after `key` (the first for None), None at the end.
pub(crate) fn next_key<K: Plain>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::zeroed();
    let mut attr = element::<K>(map, key, next.as_mut_ptr() as u64, 0);
    match bpf(MAP_GET_NEXT_KEY, &mut attr) {
        // SAFETY: zeroed first and filled by the kernel; `Plain` has no invalid bit pattern.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Opens what is pinned at `path`.
pub(crate) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf(OBJ_GET, &mut Object { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 }).map(new_fd)
}

/// Pins a map, program or link at `path`.
pub(crate) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(OBJ_PIN, &mut Object { pathname: path.as_ptr() as u64, bpf_fd: number(object), file_flags: 0 }).map(drop)
}

fn info<T: Plain + Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut value = T::default();
    let mut attr =
        Info { bpf_fd: number(object), info_len: size_of::<T>() as u32, info: std::ptr::from_mut(&mut value) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(value)
}

pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// Attaches `program`; `target` is a descriptor's number or an interface index, by the attach type.
pub(crate) fn link_create(program: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: number(program),
        target,
        attach_type,
        flags: 0,
        relative_fd: 0,
        _pad: 0,
        expected_revision: 0,
    };
    bpf(LINK_CREATE, &mut attr).map(new_fd)
}

/// Replaces the program under a link; packets and calls see the old one or the new one, never none.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate { link_fd: number(link), new_prog_fd: number(program), flags: 0, old_prog_fd: 0 };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches at once; removing the pin alone would do it some time later. A link whose target is gone is fine.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    match bpf(LINK_DETACH, &mut number(link)) {
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => Err(error),
        _ => Ok(()),
    }
}
