//! Which rule an entry of the policy map came from.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use strata_abi::direction;

/// A rule of a NetworkPolicy, or the default of the policies that isolate a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuleRef {
    pub namespace: String,
    /// One policy for a rule; all isolating ones for a default.
    pub policies: Vec<String>,
    /// [`strata_abi::direction`].
    pub direction: u8,
    /// Index into `spec.ingress` or `spec.egress`; None for a default.
    pub index: Option<usize>,
}

impl RuleRef {
    /// `ingress` or `egress`.
    pub fn direction_name(&self) -> &'static str {
        if self.direction == direction::EGRESS { "egress" } else { "ingress" }
    }
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies = self.policies.iter().map(|policy| format!("{}/{policy}", self.namespace));
        let policies = policies.collect::<Vec<_>>().join(", ");
        match self.index {
            Some(index) => write!(f, "NetworkPolicy {policies} {}[{index}]", self.direction_name()),
            None if policies.is_empty() => f.write_str("no rule"),
            None => write!(f, "NetworkPolicy {policies} (isolates {}, no rule allows)", self.direction_name()),
        }
    }
}

/// Numbers of rules, stable while a rule exists. Number 0 is no rule.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RuleTable {
    /// By number; None: free.
    slots: Vec<Option<RuleRef>>,
    /// Freed by the last compilation: events in flight may still carry these, so they rest for one more.
    resting: BTreeSet<usize>,
}

/// Gives numbers during one compilation.
pub(crate) struct RuleNumbers {
    numbers: BTreeMap<RuleRef, u32>,
    free: Vec<usize>,
    slots: Vec<Option<RuleRef>>,
    used: BTreeSet<usize>,
}

impl RuleTable {
    pub(crate) fn begin(&self) -> RuleNumbers {
        let mut slots = self.slots.clone();
        if slots.is_empty() {
            slots.push(Some(RuleRef::default()));
        }
        let named = slots.iter().enumerate().skip(1);
        let numbers = named.filter_map(|(i, rule)| Some((rule.clone()?, u32::try_from(i).ok()?))).collect();
        let free = slots.iter().enumerate().filter(|(i, rule)| rule.is_none() && !self.resting.contains(i));
        let free = free.map(|(i, _)| i).rev().collect();
        RuleNumbers { numbers, free, slots, used: BTreeSet::from([0]) }
    }

    /// Takes the numbers over and returns the table by number.
    pub(crate) fn finish(&mut self, mut numbers: RuleNumbers) -> Vec<RuleRef> {
        self.resting.clear();
        for (i, slot) in numbers.slots.iter_mut().enumerate() {
            if !numbers.used.contains(&i) && slot.take().is_some() {
                self.resting.insert(i);
            }
        }
        self.slots = numbers.slots;
        self.slots.iter().map(|slot| slot.clone().unwrap_or_default()).collect()
    }
}

impl RuleNumbers {
    pub(crate) fn number(&mut self, rule: &RuleRef) -> u32 {
        if let Some(number) = self.numbers.get(rule) {
            self.used.insert(*number as usize);
            return *number;
        }
        let slot = self.free.pop().unwrap_or(self.slots.len());
        // More than 2^32 rules do not fit into memory.
        let Ok(number) = u32::try_from(slot) else { return 0 };
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(rule.clone());
        self.used.insert(slot);
        self.numbers.insert(rule.clone(), number);
        number
    }
}
