//! Stable words for the numbers of `strata-abi`: they are labels of metrics and what users grep for.
use std::borrow::Cow;

use strata_abi::{DropReason, Verdict, hook as hooks, proto};

/// `forwarded`, `dropped`, `redirected`, `audited`, `translated`, `direct`.
pub fn verdict(number: u8) -> &'static str {
    const WORDS: [(Verdict, &str); 6] = [
        (Verdict::Forwarded, "forwarded"),
        (Verdict::Dropped, "dropped"),
        (Verdict::Redirected, "redirected"),
        (Verdict::Audited, "audited"),
        (Verdict::Translated, "translated"),
        (Verdict::Direct, "direct"),
    ];
    WORDS.iter().find(|(verdict, _)| *verdict as u8 == number).map_or("unknown", |(_, word)| word)
}

/// Empty if nothing was dropped.
pub fn drop_reason(number: u8) -> &'static str {
    const WORDS: [(DropReason, &str); 11] = [
        (DropReason::None, ""),
        (DropReason::PolicyDenied, "policy_denied"),
        (DropReason::PolicyDenyRule, "policy_deny_rule"),
        (DropReason::NoBackend, "no_backend"),
        (DropReason::UnknownServicePort, "unknown_service_port"),
        (DropReason::MeshBypass, "mesh_bypass"),
        (DropReason::SpoofedSource, "spoofed_source"),
        (DropReason::NoListener, "no_listener"),
        (DropReason::Malformed, "malformed"),
        (DropReason::Unauthorized, "unauthorized"),
        (DropReason::PlaintextRefused, "plaintext_refused"),
    ];
    WORDS.iter().find(|(reason, _)| *reason as u8 == number).map_or("unknown", |(_, word)| word)
}

/// Where the decision was made.
pub fn hook(number: u8) -> &'static str {
    match number {
        hooks::CONNECT => "connect",
        hooks::SENDMSG => "sendmsg",
        hooks::FROM_POD => "from_pod",
        hooks::TO_POD => "to_pod",
        hooks::SK_LOOKUP => "sk_lookup",
        hooks::PROXY => "proxy",
        _ => "unknown",
    }
}

/// `TCP`, `UDP` ..., or the number.
pub fn protocol(number: u8) -> Cow<'static, str> {
    match number {
        proto::ANY => "any".into(),
        proto::ICMP => "ICMP".into(),
        proto::TCP => "TCP".into(),
        proto::UDP => "UDP".into(),
        proto::ICMPV6 => "ICMPv6".into(),
        proto::SCTP => "SCTP".into(),
        other => other.to_string().into(),
    }
}
