//! The ports that a daemon listens at, none of them twice.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Role;
use super::error::ConfigError;
use super::key::Key;
use super::keys;
use super::raw::{RawConfig, RawValue};
use crate::ids::stands_for_all;

/// What the ports are bound to.
pub(super) struct Hosts {
    pub(super) peer: String,
    pub(super) rendezvous: String,
    pub(super) metrics: String,
}

/// Those of this rank. None: that one is not served.
pub(super) struct Ports {
    pub(super) init: Option<u16>,
    pub(super) alloc: Option<u16>,
    pub(super) query: Option<u16>,
    pub(super) rendezvous: Option<u16>,
    pub(super) metrics: Option<u16>,
}

/// The ports of each half. A file may have them for a daemon without that half: then there are none.
pub(super) fn ports(role: Role, raw: &RawConfig, rank: u32, hosts: &Hosts) -> Result<Ports, ConfigError> {
    let of_rank = |key: &'static Key| -> Result<Option<u16>, ConfigError> {
        if key.used_by(role) {
            of_rank(raw, key, rank)
        } else {
            // Read all the same: a file that is wrong is wrong for every daemon.
            raw.ports(key).map(|_| None)
        }
    };
    let init = of_rank(&keys::PD_PEER_INIT_PORT)?;
    let alloc = of_rank(&keys::PD_PEER_ALLOC_PORT)?;
    let query = of_rank(&keys::PD_PEER_QUERY_PORT)?;
    if role.receives() {
        raw.written(&keys::PD_PEER_INIT_PORT)?;
        raw.written(&keys::PD_PEER_ALLOC_PORT)?;
    }
    let rendezvous = of_rank(&keys::PD_RENDEZVOUS_PORT)?;
    let serves_metrics = !is_none(raw, &keys::PD_METRICS_PORT);
    let metrics = if serves_metrics { Some(of_rank(&keys::PD_METRICS_PORT)?.unwrap_or(0)) } else { None };
    let mut listened: Vec<(&'static Key, &str)> = vec![
        (&keys::PD_PEER_INIT_PORT, &hosts.peer),
        (&keys::PD_PEER_ALLOC_PORT, &hosts.peer),
        (&keys::PD_PEER_QUERY_PORT, &hosts.peer),
        (&keys::PD_RENDEZVOUS_PORT, &hosts.rendezvous),
    ];
    if serves_metrics {
        listened.push((&keys::PD_METRICS_PORT, &hosts.metrics));
    }
    listened.retain(|(key, _)| key.used_by(role));
    check_distinct(raw, &listened)?;
    Ok(Ports { init, alloc, query, rendezvous, metrics })
}

/// Refuses one port of two ranks or for two purposes: all ranks of a worker are one host to their peers.
fn check_distinct(raw: &RawConfig, listened: &[(&'static Key, &str)]) -> Result<(), ConfigError> {
    let mut taken: BTreeMap<u16, Vec<(&'static Key, &str, usize)>> = BTreeMap::new();
    for &(key, host) in listened {
        for (rank, port) in raw.ports(key)?.into_iter().flatten().enumerate().filter(|(_, port)| *port != 0) {
            let same_port = taken.entry(port).or_default();
            if let Some((earlier, _, of_rank)) = same_port.iter().find(|(_, other, _)| overlap(host, other)) {
                return Err(raw.written(key)?.refused(
                    if earlier.name == key.name {
                        format!("ranks {of_rank} and {rank} have {port} both")
                    } else {
                        format!("{} of rank {of_rank} is {port} as well", earlier.name)
                    },
                    "give each its own port, or 0 for a free port",
                ));
            }
            same_port.push((key, host, rank));
        }
    }
    Ok(())
}

/// Whether one port cannot be bound at both. Names are not looked up.
fn overlap(one: &str, other: &str) -> bool {
    let same = |one: &str, other: &str| one.eq_ignore_ascii_case(other);
    let loopback = |host: &str| host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    stands_for_all(one)
        || stands_for_all(other)
        || same(one, other)
        || (same(one, "localhost") && loopback(other))
        || (same(other, "localhost") && loopback(one))
}

fn is_none(raw: &RawConfig, key: &Key) -> bool {
    matches!(raw.entry(key).map(|entry| &entry.value), Some(RawValue::Text(text)) if text == "none")
}

/// This rank's port, where the key says one.
fn of_rank(raw: &RawConfig, key: &'static Key, rank: u32) -> Result<Option<u16>, ConfigError> {
    match raw.ports(key)?.as_deref() {
        None => Ok(None),
        // Port 0 is another port in every process.
        Some([0]) => Ok(Some(0)),
        Some(ports) => match usize::try_from(rank).ok().and_then(|index| ports.get(index)) {
            Some(port) => Ok(Some(*port)),
            None => Err(raw.written(key)?.refused(
                format!(
                    "this is rank {rank}, and there are ports for {} rank{}",
                    ports.len(),
                    if ports.len() == 1 { "" } else { "s" }
                ),
                "write a list with one port per rank, or 0 for a free port",
            )),
        },
    }
}
