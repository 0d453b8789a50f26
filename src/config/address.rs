//! How a receiver is written in `pd_receivers`.

use std::net::Ipv6Addr;

use crate::ids::ReceiverAddress;

/// One of the list: its host, and the two ports for each rank.
pub(super) struct Written {
    pub host: String,
    pub init_ports: Vec<u16>,
    pub alloc_ports: Vec<u16>,
}

/// Undoes [`text_of`], which knows one rank alone.
pub(super) fn parse(text: &str) -> Option<Written> {
    let (rest, alloc) = text.rsplit_once(':')?;
    let (host, init) = rest.rsplit_once(':')?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().ok().map(|_| address)?,
        // An address without brackets would take its last groups for ports.
        None => (!host.contains(':') && is_host(host)).then_some(host)?,
    };
    let ports = |text: &str| text.split('+').map(port).collect::<Option<Vec<u16>>>();
    Some(Written { host: host.to_owned(), init_ports: ports(init)?, alloc_ports: ports(alloc)? })
}

fn port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

/// As it is written.
pub(super) fn text_of(address: &ReceiverAddress) -> String {
    let ReceiverAddress { host, init_port, alloc_port } = address;
    if host.contains(':') {
        format!("[{host}]:{init_port}:{alloc_port}")
    } else {
        format!("{host}:{init_port}:{alloc_port}")
    }
}

/// A name or an address; not a URL, not `host:port`.
pub(super) fn is_host(text: &str) -> bool {
    const NAME_LEN_BYTES_MAX: usize = 253;
    let name = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    (1..=NAME_LEN_BYTES_MAX).contains(&text.len()) && (name || text.parse::<Ipv6Addr>().is_ok())
}
