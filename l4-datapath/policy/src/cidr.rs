//! Address blocks in the form of the identity map's keys.
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use strata_abi::Addr;

/// A block of addresses of one family. IPv4 is mapped, so a prefix length counts from 96 there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Cidr {
    bytes: [u8; 16],
    len: u32,
    v4: bool,
}

/// The block of all mapped IPv4 addresses, `::ffff:0:0/96`.
pub(crate) const ALL_V4: (Addr, u32) = (Addr::v4([0, 0, 0, 0]), 96);

impl Cidr {
    /// Host bits are dropped, as Kubernetes does.
    pub(crate) fn parse(text: &str) -> Result<Cidr, ipnet::AddrParseError> {
        text.parse::<IpNet>().map(Cidr::from)
    }

    pub(crate) fn of_address(address: IpAddr) -> Cidr {
        Cidr::from(IpNet::from(address))
    }

    pub(crate) fn key(&self) -> (Addr, u32) {
        (Addr::v6(self.bytes), self.len)
    }

    /// Whether all of `other` is in here. Blocks of different families contain nothing of each other.
    pub(crate) fn contains(&self, other: &Cidr) -> bool {
        let whole = (self.len / 8) as usize;
        let rest = self.len % 8;
        let same_tail = || {
            let mask = !(0xff_u8 >> rest);
            rest == 0 || (self.bytes[whole] & mask) == (other.bytes[whole] & mask)
        };
        self.v4 == other.v4 && self.len <= other.len && self.bytes[..whole] == other.bytes[..whole] && same_tail()
    }

    /// Whether this IPv6 block's prefix also covers the mapped IPv4 addresses, which it does not mean.
    pub(crate) fn covers_mapped(&self) -> bool {
        let v4 = Cidr { bytes: ALL_V4.0.0, len: ALL_V4.1, v4: false };
        !self.v4 && self.contains(&v4)
    }
}

impl From<IpNet> for Cidr {
    fn from(net: IpNet) -> Cidr {
        let net = net.trunc();
        let bytes = Addr::from(net.network()).0;
        match net {
            IpNet::V4(v4) => Cidr { bytes, len: 96 + u32::from(v4.prefix_len()), v4: true },
            // A block written mapped means the IPv4 addresses.
            IpNet::V6(v6) => {
                let len = u32::from(v6.prefix_len());
                Cidr { bytes, len, v4: len >= 96 && Addr::v6(bytes).as_v4().is_some() }
            }
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = if self.v4 { self.len - 96 } else { self.len };
        write!(f, "{}/{len}", IpAddr::from(Addr::v6(self.bytes)))
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

impl TryFrom<String> for Cidr {
    type Error = ipnet::AddrParseError;
    fn try_from(text: String) -> Result<Cidr, ipnet::AddrParseError> {
        Cidr::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        Cidr::parse(text).unwrap()
    }

    #[test]
    fn blocks_contain_blocks_of_their_family() {
        assert!(cidr("10.0.0.0/8").contains(&cidr("10.1.0.0/16")));
        assert!(cidr("10.0.0.0/9").contains(&cidr("10.127.0.0/16")));
        assert!(!cidr("10.0.0.0/9").contains(&cidr("10.128.0.0/16")));
        assert!(!cidr("10.1.0.0/16").contains(&cidr("10.0.0.0/8")));
        assert!(cidr("0.0.0.0/0").contains(&cidr("192.0.2.1/32")));
        assert!(!cidr("::/0").contains(&cidr("192.0.2.1/32")));
        assert!(
            cidr("::/0").covers_mapped() && !cidr("fd00::/8").covers_mapped() && !cidr("0.0.0.0/0").covers_mapped()
        );
        assert_eq!(cidr("10.1.2.3/8"), cidr("10.0.0.0/8"));
        assert_eq!(cidr("::ffff:10.0.0.0/104"), cidr("10.0.0.0/8"));
        for text in ["10.0.0.0/8", "fd00::/7", "::/0", "0.0.0.0/0"] {
            assert_eq!(cidr(text).to_string().parse::<IpNet>().unwrap(), text.parse::<IpNet>().unwrap().trunc());
        }
    }
}
