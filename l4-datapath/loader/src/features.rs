//! What kernels later than Linux 5.15 offer and we use where it is there: asked of the kernel itself, never of its version
//! (distributions bring features to older ones).
use std::os::fd::BorrowedFd;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use crate::{Error, links, sys};

/// Used where true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// A refused `connect()` fails with an errno of our choice (`bpf_set_retval`, Linux 5.18). Without it: EPERM.
    pub errno: bool,
    /// Links to an interface's ingress and egress (tcx, Linux 6.6). Without them: filters of the `clsact` qdisc.
    pub tcx: bool,
}

impl Features {
    /// What every kernel has that we run on.
    pub const OLDEST: Features = Features { errno: false, tcx: false };
}

/// See [`Features::errno`].
pub(crate) fn errno() -> Result<bool, Error> {
    let answer = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    answer.map_err(|source| Error::Program { program: "probe of bpf_set_retval".into(), source: Box::new(source) })
}

/// See [`Features::tcx`]; `program` is one for interfaces.
pub(crate) fn tcx(program: BorrowedFd<'_>) -> bool {
    // To an interface that there cannot be: a kernel that knows tcx looks for it, another does not know what is meant.
    let attempt = sys::link_create(program, i32::MAX as u32, links::TCX_INGRESS);
    attempt.is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
}
