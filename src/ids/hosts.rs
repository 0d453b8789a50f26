//! Hosts that may be connected to.

use core::net::IpAddr;
use std::collections::BTreeSet;

use ipnet::IpNet;

/// A list of host names, addresses and ranges of addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostList {
    names: BTreeSet<String>,
    ranges: Vec<IpNet>,
}

impl HostList {
    /// Takes in a name, an address, or a range such as `10.1.0.0/16` or `fd00::/8`. False: it is none of them.
    #[must_use = "false means that it is not in the list"]
    pub fn insert(&mut self, text: &str) -> bool {
        if let Ok(range) = text.parse::<IpNet>() {
            self.ranges.push(range);
        } else if let Ok(address) = text.parse::<IpAddr>() {
            self.ranges.push(address.into());
        } else {
            let is_name = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
            // What looks like an address, and is none, is a slip of the pen.
            let is_number = text.chars().all(|c| c.is_ascii_digit() || c == '.');
            if !is_name || is_number || text.is_empty() {
                return false;
            }
            self.names.insert(text.to_ascii_lowercase());
        }
        true
    }

    /// Whether a host is in the list: an address by an address or a range, a name by the same name. Names are not looked up.
    pub fn contains(&self, host: &str) -> bool {
        match host.parse::<IpAddr>() {
            Ok(address) => {
                // An address of version 4 that is written as one of version 6 is the same host.
                let address = address.to_canonical();
                self.ranges.iter().any(|range| range.contains(&address))
            }
            Err(_) => self.names.contains(&host.to_ascii_lowercase()),
        }
    }

    /// As it is written: the names, then the ranges.
    pub fn texts(&self) -> impl Iterator<Item = String> {
        let ranges = self.ranges.iter().map(|range| match range.prefix_len() == range.max_prefix_len() {
            true => range.addr().to_string(),
            false => range.to_string(),
        });
        self.names.iter().cloned().chain(ranges)
    }
}

/// Whether this can be bound, and stands for every address of the host, so that nobody can be told to connect to it.
pub fn stands_for_all(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare == "*" || bare.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> HostList {
        let mut hosts = HostList::default();
        texts.iter().for_each(|text| assert!(hosts.insert(text), "{text}"));
        hosts
    }

    #[test]
    fn a_host_is_in_the_list_by_its_name_its_address_or_its_range() {
        // Broken in production: a client's request makes decode connect to a host that the list leaves out.
        let hosts = list(&["Prefill-0.example", "10.1.0.0/16", "192.168.7.9", "fd00:1::/32", "localhost"]);
        for there in ["prefill-0.EXAMPLE", "10.1.255.3", "192.168.7.9", "fd00:1::9", "localhost", "::ffff:10.1.0.1"] {
            assert!(hosts.contains(there), "{there}");
        }
        for absent in
            ["prefill-1.example", "10.2.0.1", "192.168.7.10", "fd00:2::1", "127.0.0.1", "", "10.1.0.0/16", "::1"]
        {
            assert!(!hosts.contains(absent), "{absent}");
        }
        assert_eq!(
            hosts.texts().collect::<Vec<_>>(),
            ["localhost", "prefill-0.example", "10.1.0.0/16", "192.168.7.9", "fd00:1::/32"]
        );
    }

    #[test]
    fn what_is_no_host_is_refused() {
        // Broken in production: a slip of the pen opens the list, or closes it, without a word.
        for wrong in ["", "10.1.0.0/33", "10.1.0", "http://host", "a b", "host:80", "fd00::/129"] {
            assert!(!HostList::default().insert(wrong), "{wrong}");
        }
    }

    #[test]
    fn every_way_to_write_every_address_is_recognised() {
        for host in ["0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0", "[::]", "::ffff:0.0.0.0", "*"] {
            assert!(stands_for_all(host), "{host}");
        }
        for host in ["127.0.0.1", "::1", "10.0.0.0", "0.0.0.0.example", "localhost", ""] {
            assert!(!stands_for_all(host), "{host}");
        }
    }
}
