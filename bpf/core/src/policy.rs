//! Precedence of the policy table's entries.
//!
//! `POLICY` is a longest-prefix trie in which subject, peer and direction are always whole. So one lookup gives the
//! narrowest entry (port, port range, protocol, anything) for exactly one peer, and two lookups see what concerns
//! this peer and what concerns any peer. Within one peer the *compiler* of the table (`l4-policy`) has already
//! settled precedence: a deny that covers an allow replaces it. Between the two lookups it is settled here.
use strata_abi::{PolicyKey, Prefix, direction, identity, policy_verdict};

use crate::Maps;

/// One question: may `peer` and `subject` talk, in the direction seen from `subject`?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    pub subject: u32,
    pub peer: u32,
    /// [`strata_abi::direction`].
    pub direction: u8,
    pub proto: u8,
    /// Destination port of the connection, whoever is the subject; 0 where the protocol has none.
    pub port: u16,
}

/// The answer's kind.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// No policy isolates the subject in this direction.
    NoPolicy = 0,
    Allowed = 1,
    /// Would have been denied by default; the policy only audits.
    Audited = 2,
    DeniedByRule = 3,
    DeniedByDefault = 4,
}

impl Kind {
    #[inline(always)]
    fn from_number(number: u32) -> Kind {
        match number {
            0 => Kind::NoPolicy,
            1 => Kind::Allowed,
            2 => Kind::Audited,
            3 => Kind::DeniedByRule,
            _ => Kind::DeniedByDefault,
        }
    }
}

/// The answer and the rule that gave it (0 where none did).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judgement {
    pub kind: Kind,
    pub rule: u32,
    /// Direction of the question.
    pub direction: u8,
}

impl Judgement {
    #[inline(always)]
    pub fn allows(&self) -> bool {
        !matches!(self.kind, Kind::DeniedByRule | Kind::DeniedByDefault)
    }

    #[inline(always)]
    pub fn reason(&self) -> strata_abi::DropReason {
        match self.kind {
            Kind::DeniedByRule => strata_abi::DropReason::PolicyDenyRule,
            Kind::DeniedByDefault => strata_abi::DropReason::PolicyDenied,
            _ => strata_abi::DropReason::None,
        }
    }
}

/// Asks the table.
#[inline(always)]
pub fn judge<M: Maps>(maps: &M, question: &Question) -> Judgement {
    let direction = question.direction;
    // 1. This node may always talk to its pods and they to it: probes and the kubelet (Kubernetes' NetworkPolicy says so).
    if question.peer == identity::HOST {
        return Judgement { kind: Kind::NoPolicy, rule: 0, direction };
    }
    let port_be = u32::from(u16::from_ne_bytes(question.port.to_be_bytes()));
    let what = u32::from(direction) | u32::from(question.proto) << 8 | port_be << 16;
    let answer = ask(maps, question.subject, question.peer, what);
    Judgement { kind: Kind::from_number(answer as u32), rule: (answer >> 32) as u32, direction }
}

/// Both lookups. A function of its own, with numbers in and out: the programs ask up to twice, and two inlined copies
/// of the keys do not fit the kernel's 512 bytes of stack. Answer: kind in the low half, rule in the high.
#[inline(never)]
fn ask<M: Maps>(maps: &M, subject: u32, peer: u32, what: u32) -> u64 {
    let specific = if peer == identity::UNKNOWN { None } else { lookup(maps, subject, peer, what) };
    let any = lookup(maps, subject, 0, what);
    let (kind, rule) = decide(specific, any);
    kind as u64 | u64::from(rule) << 32
}

/// An entry as looked up: verdict and rule.
pub type Entry = (u8, u32);

#[inline(always)]
fn lookup<M: Maps>(maps: &M, subject: u32, peer: u32, what: u32) -> Option<Entry> {
    let key = PolicyKey {
        subject,
        peer,
        direction: what as u8,
        proto: (what >> 8) as u8,
        port_be: ((what >> 16) as u16).to_ne_bytes(),
    };
    maps.policy(&Prefix::new(PolicyKey::PREFIX_FULL, key)).map(|entry| (entry.verdict, entry.rule))
}

/// The numbered rules after the first, on the two entries found.
#[inline(always)]
pub fn decide(specific: Option<Entry>, any: Option<Entry>) -> (Kind, u32) {
    let (s, s_rule) = specific.unwrap_or((0, 0));
    let (a, a_rule) = any.unwrap_or((0, 0));
    // 2. A rule that denies wins over everything, the narrower peer's named first.
    if s == policy_verdict::DENY {
        return (Kind::DeniedByRule, s_rule);
    }
    if a == policy_verdict::DENY {
        return (Kind::DeniedByRule, a_rule);
    }
    // 3. Then any rule that allows.
    if s == policy_verdict::ALLOW {
        return (Kind::Allowed, s_rule);
    }
    if a == policy_verdict::ALLOW {
        return (Kind::Allowed, a_rule);
    }
    // 4. Nothing allows. The default of an isolated subject denies, naming a policy that isolates it ...
    if s == policy_verdict::DENY_DEFAULT {
        return (Kind::DeniedByDefault, s_rule);
    }
    if a == policy_verdict::DENY_DEFAULT {
        return (Kind::DeniedByDefault, a_rule);
    }
    // 5. ... or only audits.
    if s == policy_verdict::AUDIT || a == policy_verdict::AUDIT {
        return (Kind::Audited, if s == policy_verdict::AUDIT { s_rule } else { a_rule });
    }
    // 6. A verdict this build does not know is a newer agent's: fail closed.
    if specific.is_some() || any.is_some() {
        return (Kind::DeniedByDefault, 0);
    }
    // 7. No entry: not isolated.
    (Kind::NoPolicy, 0)
}

/// Egress of `subject` to `peer`.
#[inline(always)]
pub fn egress<M: Maps>(maps: &M, subject: u32, peer: u32, proto: u8, port: u16) -> Judgement {
    judge(maps, &Question { subject, peer, direction: direction::EGRESS, proto, port })
}

/// Ingress of `subject` from `peer`.
#[inline(always)]
pub fn ingress<M: Maps>(maps: &M, subject: u32, peer: u32, proto: u8, port: u16) -> Judgement {
    judge(maps, &Question { subject, peer, direction: direction::INGRESS, proto, port })
}

#[cfg(test)]
mod tests;
