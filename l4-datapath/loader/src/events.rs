//! The kernel's flow records as an asynchronous stream.
use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};
use strata_abi::{FlowEvent, names};
use tokio::io::unix::AsyncFd;

use crate::Error;

/// Reader of `EVENTS`. One reader at a time: two would share the records between them.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Must be called inside a tokio runtime.
    pub(crate) fn open(dir: &Path) -> Result<Events, Error> {
        let path = dir.join(names::EVENTS);
        let fail = |source| Error::Path { action: "open the event ring", path: path.clone(), source };
        let data = MapData::from_pin(&path).map_err(|error| fail(std::io::Error::other(error)))?;
        let map = Map::from_map_data(data).map_err(|error| fail(std::io::Error::other(error)))?;
        let ring = RingBuf::try_from(map).map_err(|error| fail(std::io::Error::other(error)))?;
        // SAFETY: the ring owns its map's descriptor, returns the same one each time, and closes it only when dropped,
        // which the AsyncFd does after deregistering.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Events { ring: ring.map_err(|error| fail(error.into()))? })
    }

    /// Waits for at least one record, then appends all that are there (at most `limit`) to `out`.
    pub async fn read(&mut self, out: &mut Vec<FlowEvent>, limit: usize) -> Result<(), Error> {
        let fail = |source| Error::Map { map: names::EVENTS, operation: "wait", source };
        loop {
            let mut guard = self.ring.readable_mut().await.map_err(fail)?;
            let before = out.len();
            let mut drained = false;
            while !drained && out.len() - before < limit {
                match guard.get_inner_mut().next() {
                    Some(item) => out.extend(decode(&item)),
                    None => drained = true,
                }
            }
            if drained {
                guard.clear_ready();
            }
            if out.len() > before {
                return Ok(());
            }
        }
    }
}

/// None for a record of another length, which only another ABI could have written.
fn decode(bytes: &[u8]) -> Option<FlowEvent> {
    if bytes.len() != size_of::<FlowEvent>() {
        return None;
    }
    // SAFETY: the length is checked, FlowEvent is `Plain` (every bit pattern is valid), the read is unaligned.
    Some(unsafe { bytes.as_ptr().cast::<FlowEvent>().read_unaligned() })
}
