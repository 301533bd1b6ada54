//! Weighted round robin without shared state: a counter and the weights decide. Host `i` takes its turn in
//! generation `g` when `g * weight` crosses a multiple of the largest weight, which spreads a host's turns evenly.

use super::{Choice, Level};

#[derive(Debug)]
pub(super) struct Schedule {
    /// Empty when all weights are equal.
    weights: Vec<u64>,
    largest: u64,
}

impl Schedule {
    pub(super) fn new(weights: impl Iterator<Item = u32>) -> Self {
        let weights: Vec<u64> = weights.map(|weight| u64::from(weight.max(1))).collect();
        let largest = weights.iter().copied().max().unwrap_or(1);
        let uniform = weights.iter().all(|weight| *weight == largest);
        Self { weights: if uniform { Vec::new() } else { weights }, largest }
    }

    pub(super) fn pick(&self, choice: &mut Choice<'_>, level: &Level, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        let count = level.hosts.len() as u64;
        // Bounded: a host with weight 1 beside one of 2^20 has its turn once in 2^20 generations.
        for _ in 0..(count * 4).max(64) {
            let turn = choice.cursor.get();
            choice.cursor.set(turn.wrapping_add(1));
            let (position, generation) = ((turn % count) as usize, turn / count);
            if self.has_turn(position, generation) && usable(position) && self.is_warm(position, choice, level) {
                return Some(position);
            }
        }
        level.draw_usable(choice.rng, usable)
    }

    fn has_turn(&self, position: usize, generation: u64) -> bool {
        let Some(weight) = self.weights.get(position) else { return true };
        let offset = position as u64 * self.largest / 2;
        (generation.wrapping_mul(*weight).wrapping_add(offset)) % self.largest >= self.largest - weight
    }

    fn is_warm(&self, position: usize, choice: &mut Choice<'_>, level: &Level) -> bool {
        choice.slow_start.is_none() || choice.rng.unit() < level.warmth(position, choice)
    }
}
