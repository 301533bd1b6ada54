//! Flow records into the ring.
use strata_abi::{FlowEvent, stat};

use crate::maps::{EVENTS, count};

/// Writes a record, or counts it lost.
#[inline(always)]
pub fn emit(event: FlowEvent) {
    match EVENTS.reserve::<FlowEvent>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(0);
        }
        None => count(stat::EVENTS_LOST, 1),
    }
}
