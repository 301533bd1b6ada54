//! Consistent hashing on a ring: every host owns points in proportion to its weight; a key belongs to the next
//! point. A host that is out hands its keys to the next points, nobody else's keys move.

use xxhash_rust::xxh64::xxh64;

#[derive(Debug)]
pub(super) struct Ring {
    /// Point and host position, sorted.
    points: Vec<(u64, u32)>,
}

impl Ring {
    pub(super) fn new(hosts: &[(&str, u32)], minimum: u32, maximum: u32) -> Self {
        let total: f64 = hosts.iter().map(|(_, weight)| f64::from((*weight).max(1))).sum();
        let lightest = hosts.iter().map(|(_, weight)| f64::from((*weight).max(1))).fold(f64::INFINITY, f64::min);
        // As many points for the lightest host as give the ring at least `minimum`, at most `maximum` points.
        let scale = ((lightest / total * f64::from(minimum)).ceil() / (lightest / total)).min(f64::from(maximum));
        let mut points = Vec::with_capacity(scale as usize + hosts.len());
        let mut key = String::new();
        for (position, (name, weight)) in hosts.iter().enumerate() {
            let share = (f64::from((*weight).max(1)) / total * scale).round().max(1.0) as u32;
            for copy in 0..share {
                key.clear();
                key.push_str(name);
                key.push('_');
                key.push_str(&copy.to_string());
                points.push((xxh64(key.as_bytes(), 0), position as u32));
            }
        }
        points.sort_unstable();
        Self { points }
    }

    pub(super) fn pick(&self, key: u64, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        let start = self.points.partition_point(|(point, _)| *point < key);
        let walk = self.points[start..].iter().chain(&self.points[..start]);
        walk.map(|(_, position)| *position as usize).find(|position| usable(*position))
    }
}
