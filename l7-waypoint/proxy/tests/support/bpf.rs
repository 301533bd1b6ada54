//! A small `sk_lookup` program, assembled by hand: what the lower layer does for a pod's IPv4 connections, so
//! that the proxy's own tests need nothing of that layer but the kernel.
use std::ffi::CString;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: i64 = 0;
const MAP_UPDATE: i64 = 2;
const PROG_LOAD: i64 = 5;
const LINK_CREATE: i64 = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Keys of the map, as `strata_handoff::listener` numbers the IPv4 kinds.
const OUTBOUND: i32 = 0;
const INBOUND: i32 = 2;
const HBONE: i32 = 4;

pub struct Lookup {
    _link: OwnedFd,
    map: OwnedFd,
}

struct Attr([u8; 128]);

impl Attr {
    fn new() -> Attr {
        Attr([0; 128])
    }
    fn u32(mut self, at: usize, value: u32) -> Attr {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }
    fn pointer<T>(mut self, at: usize, value: *const T) -> Attr {
        self.0[at..at + 8].copy_from_slice(&(value as u64).to_ne_bytes());
        self
    }
    fn call(self, command: i64) -> io::Result<i64> {
        // SAFETY: the attribute is 128 bytes, larger than any field the kernel reads for these commands, zeroed
        // where unset; the pointers in it outlive the call.
        let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), self.0.len()) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
    }
    fn open(self, command: i64) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        // SAFETY: the kernel just returned this descriptor and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

impl Lookup {
    /// Attaches to the namespace of the pod with address `own`.
    pub fn attach(netns: BorrowedFd<'_>, own: Ipv4Addr) -> io::Result<Lookup> {
        let map = Attr::new().u32(0, MAP_TYPE_SOCKMAP).u32(4, 4).u32(8, 4).u32(12, 8).open(MAP_CREATE)?;
        let program = program(map.as_raw_fd(), own);
        let license = CString::new("GPL").unwrap();
        let mut log = vec![0u8; 1 << 16];
        let loaded = Attr::new()
            .u32(0, PROG_TYPE_SK_LOOKUP)
            .u32(4, program.len() as u32)
            .pointer(8, program.as_ptr())
            .pointer(16, license.as_ptr())
            .u32(24, 1)
            .u32(28, log.len() as u32)
            .pointer(32, log.as_mut_ptr())
            .u32(68, ATTACH_SK_LOOKUP)
            .open(PROG_LOAD)
            .map_err(|error| io::Error::other(format!("{error}: {}", String::from_utf8_lossy(&log))))?;
        let link = Attr::new()
            .u32(0, loaded.as_raw_fd() as u32)
            .u32(4, netns.as_raw_fd() as u32)
            .u32(8, ATTACH_SK_LOOKUP)
            .open(LINK_CREATE)?;
        Ok(Lookup { _link: link, map })
    }

    /// Puts a listener into the map.
    pub fn set(&self, kind: u32, listener: BorrowedFd<'_>) -> io::Result<()> {
        let (key, value) = (kind, listener.as_raw_fd() as u32);
        let attr =
            Attr::new().u32(0, self.map.as_raw_fd() as u32).pointer(8, &raw const key).pointer(16, &raw const value);
        attr.call(MAP_UPDATE).map(drop)
    }
}

fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    u64::from(code) | u64::from(dst | src << 4) << 8 | u64::from(off as u16) << 16 | u64::from(imm as u32) << 32
}

/// Offsets are those of `struct bpf_sk_lookup` (include/uapi/linux/bpf.h).
fn program(map: i32, own: Ipv4Addr) -> Vec<u64> {
    let own = i32::from_ne_bytes(own.octets());
    const PASS: i16 = i16::MAX;
    const ASSIGN: i16 = i16::MAX - 1;
    let load = |dst, off| insn(0x61, dst, 6, off, 0);
    let ne = |dst, imm, to| insn(0x56, dst, 0, to, imm);
    let eq = |dst, imm, to| insn(0x16, dst, 0, to, imm);
    let mov = |dst, imm| insn(0xb7, dst, 0, 0, imm);
    let copy = |dst, src| insn(0xbf, dst, src, 0, 0);
    let goto = |to| insn(0x05, 0, 0, to, 0);
    let mut code = vec![
        copy(6, 1),
        load(2, 8), // family
        ne(2, 2, PASS),
        load(7, 40), // local_ip4
        load(8, 16), // remote_ip4
        copy(9, 7),
        insn(0x57, 9, 0, 0, 0xff),
        eq(9, 127, PASS),
        ne(8, own, 3), // not from the pod itself: skip the outbound part
        eq(7, own, PASS),
        mov(9, OUTBOUND),
        goto(ASSIGN),
        ne(7, own, PASS),
        load(2, 64), // ingress_ifindex
        eq(2, 1, PASS),
        load(2, 60), // local_port
        mov(9, INBOUND),
        ne(2, 15008, 1),
        mov(9, HBONE),
    ];
    let assign = code.len();
    code.extend([
        insn(0x63, 10, 9, -4, 0),
        insn(0x18, 1, 1, 0, map),
        0,
        copy(2, 10),
        insn(0x07, 2, 0, 0, -4),
        insn(0x85, 0, 0, 0, 1), // map_lookup_elem
        insn(0x55, 0, 0, 2, 0),
        mov(0, 0), // no listener: drop
        insn(0x95, 0, 0, 0, 0),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        mov(3, 2),                // BPF_SK_LOOKUP_F_NO_REUSEPORT
        insn(0x85, 0, 0, 0, 124), // sk_assign
        copy(1, 7),
        insn(0x85, 0, 0, 0, 86), // sk_release
    ]);
    let pass = code.len();
    code.extend([mov(0, 1), insn(0x95, 0, 0, 0, 0)]);
    for (at, instruction) in code.iter_mut().enumerate() {
        let target = match ((*instruction >> 16) & 0xffff) as i16 {
            PASS => pass,
            ASSIGN => assign,
            _ => continue,
        };
        let off = (target - at - 1) as u16;
        *instruction = *instruction & !(0xffff << 16) | u64::from(off) << 16;
    }
    code
}
