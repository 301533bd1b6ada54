//! A netlink connection of one namespace, in the few operations this project needs.
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkMessage, State};
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, IpVersion, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::{Error, run_in};

/// Marks the routes this project made (`ip route show proto 83`), so that it never touches another's.
pub const PROTOCOL: u8 = 83;

/// Longest alias of a device in bytes (IFALIASZ, without the end).
pub const MAX_ALIAS: usize = 255;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Link-layer address; empty for devices without one.
    pub mac: Vec<u8>,
    pub mtu: u32,
    pub up: bool,
    /// Packets pass: the kernel has seen the carrier and given the device its queue (RFC 2863 operational state).
    pub operational: bool,
    /// Index of the other end of a veth pair (in the other end's namespace); 0 if it has none.
    pub peer_index: u32,
    /// The other end's namespace, by the number this one has for it ([`Netlink::number_of`]); None: the same, or none.
    pub peer_netns: Option<i32>,
    /// What somebody wrote on it (`ip link set dev NAME alias TEXT`).
    pub alias: Option<String>,
}

/// One connection; cloneable, used from any task of the runtime it was opened in.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

/// A name and an index are `Err` here only for the kernel's own refusals.
pub(crate) fn failed(action: impl Into<String>, error: rtnetlink::Error) -> Error {
    let source = match &error {
        rtnetlink::Error::NetlinkError(message) => match message.code {
            Some(code) => io::Error::from_raw_os_error(code.get().abs()),
            None => io::Error::other(error.to_string()),
        },
        _ => io::Error::other(error.to_string()),
    };
    Error::Netlink { action: action.into(), source }
}

/// Turns the given errno of a refused request into success.
pub(crate) fn tolerate(result: Result<(), Error>, errnos: &[i32]) -> Result<(), Error> {
    match result {
        Err(error) if error.errno().is_some_and(|errno| errnos.contains(&errno)) => Ok(()),
        other => other,
    }
}

impl Netlink {
    /// A connection in the caller's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the kernel refuses the socket.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// A connection in another namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the namespace cannot be entered or the kernel refuses the socket.
    pub fn open_in(netns: BorrowedFd<'_>) -> Result<Self, Error> {
        let runtime = tokio::runtime::Handle::current();
        run_in(netns, || {
            let _entered = runtime.enter();
            Self::open()
        })?
    }

    /// The device, or None.
    ///
    /// # Errors
    /// If the kernel refuses the request.
    pub async fn find_link(&self, name: &str) -> Result<Option<Link>, Error> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.map(describe)),
            Err(error) => match failed(format!("look up device {name}"), error) {
                error if error.errno() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The device with this index, or None.
    ///
    /// # Errors
    /// If the kernel refuses the request.
    pub async fn find_link_by_index(&self, index: u32) -> Result<Option<Link>, Error> {
        let found = self.handle.link().get().match_index(index).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.map(describe)),
            Err(error) => match failed(format!("look up device {index}"), error) {
                error if error.errno() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The device.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] if there is none.
    pub async fn link(&self, name: &str) -> Result<Link, Error> {
        self.find_link(name).await?.ok_or_else(|| Error::NoSuchDevice { name: name.to_owned() })
    }

    /// All devices.
    ///
    /// # Errors
    /// If the kernel refuses the request.
    pub async fn links(&self) -> Result<Vec<Link>, Error> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(|e| failed("list devices", e))?;
        Ok(messages.into_iter().map(describe).collect())
    }

    /// The number this namespace has for another (`ip netns list-id`); None if it never met it.
    ///
    /// # Errors
    /// If the kernel refuses the request.
    pub async fn number_of(&self, netns: BorrowedFd<'_>) -> Result<Option<i32>, Error> {
        let mut question = NsidMessage::default();
        question.attributes.push(NsidAttribute::Fd(netns.as_raw_fd().unsigned_abs()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
        request.header.flags = NLM_F_REQUEST;
        let what = "look up the number of a namespace";
        let mut answers = self.handle.clone().request(request).map_err(|error| failed(what, error))?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer)) => {
                    let number = |attribute: &NsidAttribute| match attribute {
                        NsidAttribute::Id(number) => Some(*number),
                        _ => None,
                    };
                    return Ok(answer.attributes.iter().find_map(number).filter(|number| *number >= 0));
                }
                NetlinkPayload::Error(error) => return Err(failed(what, rtnetlink::Error::NetlinkError(error))),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Makes a veth pair: `name` here, `peer` in `peer_netns`, both down.
    ///
    /// # Errors
    /// If one of the names is taken.
    pub async fn add_veth(
        &self,
        (name, mac): (&str, [u8; 6]),
        (peer, peer_mac): (&str, [u8; 6]),
        peer_netns: BorrowedFd<'_>,
        mtu: u32,
    ) -> Result<(), Error> {
        let other = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer.to_owned())
            .address(peer_mac.to_vec())
            .mtu(mtu)
            .setns_by_fd(peer_netns.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(name.to_owned())
            .address(mac.to_vec())
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(other)))
            .build();
        let added = self.handle.link().add(pair).execute().await;
        added.map_err(|error| failed(format!("create veth {name} with peer {peer}"), error))
    }

    /// Removes a device; none of this index is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn delete_link(&self, index: u32) -> Result<(), Error> {
        let deleted = self.handle.link().del(index).execute().await;
        tolerate(deleted.map_err(|e| failed(format!("delete device {index}"), e)), &[libc::ENODEV])
    }

    /// Brings a device up.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn set_up(&self, index: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|e| failed(format!("bring up device {index}"), e))
    }

    /// Writes on a device whose it is; at most [`MAX_ALIAS`] bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<(), Error> {
        let attribute = LinkAttribute::IfAlias(alias.to_owned());
        let message = LinkUnspec::new_with_index(index).append_extra_attribute(attribute).build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|e| failed(format!("set the alias of device {index}"), e))
    }

    /// Gives a device an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<(), Error> {
        let mut request = self.handle.address().add(index, address, prefix).replace();
        if address.is_ipv6() {
            let flags = netlink_packet_route::address::AddressFlags::Nodad;
            request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        }
        request.execute().await.map_err(|e| failed(format!("add address {address}/{prefix} to device {index}"), e))
    }

    /// The addresses of a device.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpAddr>, Error> {
        let request = self.handle.address().get().set_link_index_filter(index).execute();
        let messages: Vec<_> =
            request.try_collect().await.map_err(|e| failed(format!("list addresses of device {index}"), e))?;
        let of = |message: netlink_packet_route::address::AddressMessage| {
            let mut found = None;
            for attribute in message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => return Some(ip),
                    AddressAttribute::Address(ip) => found = Some(ip),
                    _ => {}
                }
            }
            found
        };
        Ok(messages.into_iter().filter_map(of).collect())
    }

    /// A neighbour that is never asked for.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: &[u8]) -> Result<(), Error> {
        let request = self.handle.neighbours().add(index, address);
        let request = request.state(NeighbourState::Permanent).link_layer_address(mac).replace();
        request.execute().await.map_err(|e| failed(format!("set neighbour {address} on device {index}"), e))
    }

    /// Adds a route or replaces the one of the same destination, metric and table.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn set_route(&self, route: RouteMessage, what: &str) -> Result<(), Error> {
        let added = self.handle.route().add(route).replace().execute().await;
        added.map_err(|e| failed(format!("add route {what}"), e))
    }

    /// Removes a route; none is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn delete_route(&self, route: RouteMessage, what: &str) -> Result<(), Error> {
        let deleted = self.handle.route().del(route).execute().await;
        tolerate(deleted.map_err(|e| failed(format!("delete route {what}"), e)), &[libc::ESRCH, libc::ENODEV])
    }

    /// The routes this project made ([`PROTOCOL`]) in the main table.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn own_routes(&self) -> Result<Vec<RouteMessage>, Error> {
        let mut own = Vec::new();
        for message in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            // The builder's own defaults (table, protocol) must not filter: the kernel dumps by family only.
            let routes: Vec<RouteMessage> =
                self.handle.route().get(message).execute().try_collect().await.map_err(|e| failed("list routes", e))?;
            own.extend(routes.into_iter().filter(|route| {
                u8::from(route.header.protocol) == PROTOCOL && route.header.table == libc::RT_TABLE_MAIN
            }));
        }
        Ok(own)
    }

    /// `ip [-6] rule add fwmark MARK pref PRIORITY lookup TABLE`; there already is fine.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn add_mark_rule(&self, v6: bool, mark: u32, priority: u32, table: u32) -> Result<(), Error> {
        let request = self.handle.rule().add();
        let request = request.fw_mark(mark).priority(priority).table_id(table).action(RuleAction::ToTable);
        let added = if v6 { request.v6().execute().await } else { request.v4().execute().await };
        let what = format!("add rule fwmark {mark:#x} lookup {table}");
        tolerate(added.map_err(|e| failed(what, e)), &[libc::EEXIST])
    }

    /// Removes every rule that leads this mark into this table.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn delete_mark_rules(&self, v6: bool, mark: u32, priority: u32) -> Result<(), Error> {
        let version = if v6 { IpVersion::V6 } else { IpVersion::V4 };
        let listed = self.handle.rule().get(version).execute().try_collect::<Vec<_>>().await;
        for rule in listed.map_err(|e| failed("list rules", e))? {
            let ours = rule.attributes.contains(&RuleAttribute::FwMark(mark))
                && rule.attributes.contains(&RuleAttribute::Priority(priority));
            if ours {
                let deleted = self.handle.rule().del(rule).execute().await;
                let what = format!("delete rule fwmark {mark:#x}");
                tolerate(deleted.map_err(|e| failed(what, e)), &[libc::ENOENT])?;
            }
        }
        Ok(())
    }
}

/// A route to build on, marked as ours.
pub(crate) fn route_to(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    let builder = RouteMessageBuilder::<IpAddr>::new().protocol(RouteProtocol::Other(PROTOCOL));
    // The builder refuses only prefix lengths that an IpNet cannot have.
    match builder.clone().destination_prefix(destination.addr(), destination.prefix_len()) {
        Ok(built) => built,
        Err(_) => builder,
    }
}

/// The gateway of a route.
pub(crate) fn gateway_of(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => to_ip(address),
        _ => None,
    })
}

/// The destination of a route.
pub(crate) fn destination_of(route: &RouteMessage) -> Option<IpNet> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => to_ip(address),
        _ => None,
    })?;
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

/// The device of a route.
pub(crate) fn device_of(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Whether a route refuses its destination.
pub(crate) fn is_unreachable(route: &RouteMessage) -> bool {
    route.header.kind == RouteType::Unreachable
}

fn to_ip(address: &netlink_packet_route::route::RouteAddress) -> Option<IpAddr> {
    match address {
        netlink_packet_route::route::RouteAddress::Inet(v4) => Some((*v4).into()),
        netlink_packet_route::route::RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn describe(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        operational: false,
        peer_index: 0,
        peer_netns: None,
        alias: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => link.peer_index = index,
            LinkAttribute::OperState(state) => link.operational = state == State::Up,
            LinkAttribute::LinkNetNsId(number) => link.peer_netns = Some(number),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            _ => {}
        }
    }
    link
}
