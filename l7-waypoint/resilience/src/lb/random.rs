//! A host drawn at random by weight.

use super::{Choice, Level};

pub(super) fn pick(level: &Level, choice: &mut Choice<'_>, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
    level.draw_usable(choice.rng, usable)
}
