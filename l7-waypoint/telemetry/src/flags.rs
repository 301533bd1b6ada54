//! Envoy's response flags: why an answer is what it is.

use std::fmt;

/// A set of response flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal;)*) => {
        impl Flags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*
            const TEXTS: &'static [(u32, &'static str)] = &[$((1 << $bit, $text)),*];
        }
    };
}

flags! {
    /// No healthy upstream.
    NO_HEALTHY_UPSTREAM = 0, "UH";
    /// The upstream connection could not be made.
    UPSTREAM_CONNECTION_FAILURE = 1, "UF";
    /// A circuit breaker is open.
    UPSTREAM_OVERFLOW = 2, "UO";
    /// No route.
    NO_ROUTE = 3, "NR";
    /// Retries are used up.
    RETRY_LIMIT = 4, "URX";
    /// The cluster the route names is not known.
    NO_CLUSTER = 5, "NC";
    /// The downstream connection ended.
    DOWNSTREAM_TERMINATION = 6, "DC";
    /// We reset the upstream stream.
    LOCAL_RESET = 7, "LR";
    /// The upstream reset the stream.
    UPSTREAM_RESET = 8, "UR";
    /// The upstream closed the connection.
    UPSTREAM_TERMINATION = 9, "UC";
    /// The upstream took too long.
    UPSTREAM_TIMEOUT = 10, "UT";
    /// Delay injected.
    DELAY_INJECTED = 11, "DI";
    /// Abort injected.
    FAULT_INJECTED = 12, "FI";
    /// The external authorization service refused.
    EXTERNAL_AUTH = 13, "UAEX";
    /// The request breaks the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 14, "DPE";
    /// The response breaks the protocol.
    UPSTREAM_PROTOCOL_ERROR = 15, "UPE";
    /// Longest stream duration reached.
    MAX_DURATION = 16, "UMSDR";
    /// Nothing happened on the stream for too long.
    IDLE_TIMEOUT = 17, "SI";
    /// Authorization refused the connection (Strata's and ztunnel's word; Envoy has none for TCP).
    DENIED = 18, "DENY";
}

impl Flags {
    /// Adds `other`.
    pub fn set(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether any of `other` is set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether nothing is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Envoy's abbreviations of what is set.
    pub fn texts(self) -> impl Iterator<Item = &'static str> {
        Self::TEXTS.iter().filter(move |(bit, _)| self.0 & bit != 0).map(|(_, text)| *text)
    }
}

impl fmt::Display for Flags {
    /// Comma-separated; `-` when empty.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return out.write_str("-");
        }
        for (position, text) in self.texts().enumerate() {
            if position > 0 {
                out.write_str(",")?;
            }
            out.write_str(text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_as_envoy_does() {
        let mut flags = Flags::default();
        assert_eq!(flags.to_string(), "-");
        flags.set(Flags::RETRY_LIMIT);
        flags.set(Flags::UPSTREAM_CONNECTION_FAILURE);
        assert_eq!(flags.to_string(), "UF,URX");
        assert!(flags.has(Flags::RETRY_LIMIT) && !flags.has(Flags::NO_ROUTE));
    }
}
