//! `pd_receivers`: where the receivers are that the outgoing half connects to at start.

use std::collections::BTreeSet;

use super::address::{Written, parse};
use super::error::ConfigError;
use super::keys;
use super::raw::{Entry, RawConfig, RawValue};
use super::{Limits, Role};
use crate::ids::ReceiverAddress;

/// Those of this rank, in the order written. A file may have them for a daemon without an outgoing half: then there are none.
pub(super) fn receivers(
    role: Role,
    raw: &RawConfig,
    rank: u32,
    limits: &Limits,
) -> Result<Vec<ReceiverAddress>, ConfigError> {
    let key = &keys::PD_RECEIVERS;
    let Some(entry) = raw.entry(key) else { return Ok(Vec::new()) };
    let items = match &entry.value {
        RawValue::List(items) => items.as_slice(),
        one => std::slice::from_ref(one),
    };
    let text_of = |item: &RawValue| match item {
        RawValue::Text(text) => Some(text.clone()),
        _ => None,
    };
    // Read where nothing is sent, too: a file that is wrong is wrong for every daemon.
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        let text = text_of(item).ok_or_else(|| entry.bad(key))?;
        let written = parse(&text).ok_or_else(|| entry.bad(key))?;
        all.push((text, written));
    }
    if !role.sends() {
        return Ok(Vec::new());
    }
    let most = limits.peers_max as usize;
    if all.len() > most {
        return Err(entry.refused(
            format!("there are {} of them, and {} is {most}", all.len(), keys::PD_MAX_PEERS.name),
            format!("raise {}, or leave some out", keys::PD_MAX_PEERS.name),
        ));
    }
    let mut seen = BTreeSet::new();
    let mut addresses = Vec::with_capacity(all.len());
    for (text, written) in all {
        let address = of_rank(entry, &text, written, rank)?;
        if !seen.insert(address.clone()) {
            return Err(entry.refused(format!("{text:?} is there twice for rank {rank}"), "keep one of them"));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

fn of_rank(entry: &Entry, text: &str, written: Written, rank: u32) -> Result<ReceiverAddress, ConfigError> {
    let ports =
        [&written.init_ports, &written.alloc_ports].map(|ports| (ports.get(rank as usize).copied(), ports.len()));
    let [(Some(init_port), _), (Some(alloc_port), _)] = ports else {
        let least = ports.map(|(_, count)| count).into_iter().min().unwrap_or_default();
        return Err(entry.refused(
            format!(
                "this is rank {rank}, and {text:?} has ports for {least} rank{}",
                if least == 1 { "" } else { "s" }
            ),
            "join one port per rank with +, as in 10.0.0.2:7300+7301:7400+7401",
        ));
    };
    if init_port == alloc_port {
        return Err(entry.refused(
            format!("{text:?} has {init_port} twice for rank {rank}"),
            "give the port of the handshake first, then that of allocations, as the receiver's ready line names them",
        ));
    }
    Ok(ReceiverAddress { host: written.host, init_port, alloc_port })
}
