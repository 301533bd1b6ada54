//! Programs on interfaces where the kernel has no tcx links (before Linux 6.6): filters of the `clsact` qdisc (tc-bpf(8)).
//!
//! A filter stays by itself and tells nothing of us, so the program is pinned beside the links, under a name that says
//! where it is attached: `PROGRAM@IFINDEX_PODINDEX`. Pins of interfaces that are gone are removed with the pod.
use std::{
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
};
use nix::net::if_::if_indextoname;

use crate::{Error, sys};

/// Of our filters: one of each program on an interface. Others' filters come before or after, by their priority.
const PRIORITY: u16 = 0x5354;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Where a program is attached, as its pin's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place<'a> {
    pub(crate) program: &'a str,
    pub(crate) ifindex: u32,
    pub(crate) pod_index: u32,
}

impl<'a> Place<'a> {
    /// Reads a pin's name; `None` for a link's.
    pub(crate) fn read(name: &'a str) -> Option<Place<'a>> {
        let (program, rest) = name.split_once('@')?;
        let (ifindex, pod_index) = rest.split_once('_')?;
        Some(Place { program, ifindex: ifindex.parse().ok()?, pod_index: pod_index.parse().ok()? })
    }

    fn pin(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}@{}_{}", self.program, self.ifindex, self.pod_index))
    }

    fn side(&self) -> TcAttachType {
        // Named from the pod; the interface is the host's end.
        if self.program == "from_pod" { TcAttachType::Ingress } else { TcAttachType::Egress }
    }

    /// Takes the filter away. One whose interface is gone has gone with it.
    fn detach(&self) -> io::Result<()> {
        use aya::programs::links::Link as _;
        let Some(interface) = self.interface() else { return Ok(()) };
        SchedClassifierLink::attached(&interface, self.side(), PRIORITY, HANDLE, None)?
            .detach()
            .map_err(io::Error::other)
    }

    /// The interface's name; `None` if it is gone.
    pub(crate) fn interface(&self) -> Option<String> {
        if_indextoname(self.ifindex).ok()?.into_string().ok()
    }
}

/// After this, `program` filters at `place`; what filtered there before is replaced in one step.
pub(crate) fn ensure(dir: &Path, place: Place<'_>, program: BorrowedFd<'_>) -> Result<(), Error> {
    let target = format!("interface {}", place.ifindex);
    let fail = |action, source| Error::Attach { program: place.program.into(), action, target: target.clone(), source };
    let interface = place.interface().ok_or_else(|| fail("attach to", io::Error::from_raw_os_error(libc::ENODEV)))?;
    for stale in places(dir, place.program, place.pod_index)? {
        let found = Place { ifindex: stale, ..place };
        std::fs::remove_file(found.pin(dir)).map_err(|e| fail("unpin the stale program of", e))?;
    }
    let pin = place.pin(dir);
    sys::obj_pin(program, &pin).map_err(|e| fail("pin the program of", e))?;
    match qdisc_add_clsact(&interface) {
        Err(error) if !is(&error, io::ErrorKind::AlreadyExists) => {
            return Err(fail("add the clsact qdisc to", io::Error::other(error)));
        }
        _ => {}
    }
    let attached = SchedClassifier::from_pin(&pin).and_then(|mut classifier| {
        let side = place.side();
        let present =
            SchedClassifierLink::attached(&interface, side, PRIORITY, HANDLE, None).map_err(TcError::IoError)?;
        let link = classifier.attach_to_link(present).or_else(|_| {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            classifier.attach_with_options(&interface, side, TcAttachOptions::Netlink(options))
        })?;
        // It is to outlive us.
        std::mem::forget(classifier.take_link(link)?);
        Ok(())
    });
    attached.map_err(|error: ProgramError| fail("attach to", io::Error::other(error)))
}

/// Takes a pod's filter away; false if there was none.
pub(crate) fn remove(dir: &Path, program: &str, pod_index: u32) -> Result<bool, Error> {
    let mut found = false;
    for ifindex in places(dir, program, pod_index)? {
        let place = Place { program, ifindex, pod_index };
        let detached = place.detach();
        detached.map_err(|source| Error::Path { action: "detach the filter", path: place.pin(dir), source })?;
        let path = place.pin(dir);
        std::fs::remove_file(&path).map_err(|source| Error::Path { action: "unpin", path, source })?;
        found = true;
    }
    Ok(found)
}

/// Takes away every filter that pins in `dir` tell of; the pins stay.
pub(crate) fn detach_all(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Some(place) = name.to_str().and_then(Place::read)
            && let Err(error) = place.detach()
        {
            tracing::warn!(?place, %error, "a filter could not be taken away");
        }
    }
}

/// Interfaces that pins say a pod's program is on.
fn places(dir: &Path, program: &str, pod_index: u32) -> Result<Vec<u32>, Error> {
    let fail = |source| Error::Path { action: "list", path: dir.into(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        match name.to_str().and_then(Place::read) {
            Some(place) if place.program == program && place.pod_index == pod_index => found.push(place.ifindex),
            _ => {}
        }
    }
    Ok(found)
}

fn is(error: &TcError, kind: io::ErrorKind) -> bool {
    match error {
        TcError::NetlinkError(error) => {
            error.raw_os_error().is_some_and(|os| io::Error::from_raw_os_error(os).kind() == kind)
        }
        TcError::IoError(error) => error.kind() == kind,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pins_name_says_where() {
        let place = Place { program: "from_pod", ifindex: 12, pod_index: 7 };
        let pin = place.pin(Path::new("/x"));
        assert_eq!(pin, Path::new("/x/from_pod@12_7"));
        assert_eq!(Place::read(pin.file_name().unwrap().to_str().unwrap()), Some(place));
        for link in ["from_pod_7", "sk_lookup_7", "connect4", "from_pod@_7", "@"] {
            assert_eq!(Place::read(link), None, "{link}");
        }
    }
}
