//! Two hosts drawn at random, the less busy one taken. With different weights hosts are drawn by weight and
//! compared by requests in flight per weight, so that an idle cluster follows the weights and a busy one the load.

use super::{Choice, Level};

pub(super) fn pick(level: &Level, choice: &mut Choice<'_>, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
    let first = level.draw_usable(choice.rng, usable)?;
    if level.hosts.len() == 1 {
        return Some(first);
    }
    let second = level.draw_usable(choice.rng, usable)?;
    if first == second {
        return Some(first);
    }
    let load = |position: usize| {
        let host = &level.hosts[position];
        let share =
            level.warmth(position, choice) * f64::from(if level.sums.is_empty() { 1 } else { host.weight.max(1) });
        f64::from(host.state.active() + 1) / share
    };
    // Both were drawn by weight already, so equal in-flight counts must not prefer the heavier one again.
    let idle = level.hosts[first].state.active() == 0 && level.hosts[second].state.active() == 0;
    if idle && choice.slow_start.is_none() {
        return Some(first);
    }
    Some(if load(second) < load(first) { second } else { first })
}
