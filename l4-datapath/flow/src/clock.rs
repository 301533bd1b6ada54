//! The kernel counts nanoseconds since boot; people read dates.
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Turns `CLOCK_BOOTTIME` into wall-clock time.
#[derive(Clone, Copy, Debug)]
pub struct BootClock {
    boot: SystemTime,
}

impl BootClock {
    /// Reads both clocks. Make a new one now and then: the wall clock may be set.
    pub fn now() -> BootClock {
        BootClock::at(SystemTime::now(), since_boot())
    }

    /// A clock by which `since_boot` after boot it was `wall`.
    pub fn at(wall: SystemTime, since_boot: Duration) -> BootClock {
        BootClock { boot: wall.checked_sub(since_boot).unwrap_or(SystemTime::UNIX_EPOCH) }
    }

    /// RFC 3339 with nanoseconds, UTC.
    pub fn format(&self, time_ns: u64) -> String {
        format_time(self.boot + Duration::from_nanos(time_ns))
    }
}

/// RFC 3339, UTC.
pub(crate) fn format_time(time: SystemTime) -> String {
    // Years beyond 9999 do not happen to a machine that boots today.
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

/// Time since boot, sleep included; from `/proc/uptime`, whose hundredths of a second are exact enough for a label.
fn since_boot() -> Duration {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(0.0))
}
