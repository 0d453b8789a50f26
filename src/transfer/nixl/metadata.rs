//! Looking over a peer's metadata before NIXL does.
//!
//! NIXL's own reader adds lengths from the network to offsets unchecked, so only what is whole gets there. The form
//! is that of NIXL 1.5: `nixlSerDes|`, then records of a tag, a length (8 bytes, little-endian), that many bytes and
//! `|`, in a fixed order. What UCX packed into the connection and the memory keys cannot be checked from outside.

use std::collections::BTreeSet;

use crate::ids::METADATA_LEN_BYTES_MAX;

/// Longest agent name that is accepted.
const AGENT_NAME_LEN_BYTES_MAX: usize = 256;
/// Most backends, and most lists of ranges.
const PARTS_MAX: u64 = 64;
/// Host, device, block, object, file.
const MEMORY_TYPE_COUNT: u32 = 5;
/// A range of memory before its key: address, length, device.
const RANGE_LEN_BYTES: usize = 24;

const INTRO: &[u8] = b"nixlSerDes|";

/// What an agent says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata<'a> {
    pub(super) agent_name: &'a str,
    /// How to reach it: backend and what that has to say.
    connections: BTreeSet<(&'a [u8], &'a [u8])>,
    /// Its memory: backend, type, and range with its key.
    memory: BTreeSet<(&'a [u8], &'a [u8], &'a [u8])>,
}

impl Metadata<'_> {
    /// Says so unless everything that `before` says is still said.
    ///
    /// NIXL takes more metadata of an agent that it knows: what it has already is compared, what is new is added. But when
    /// one thing has changed it forgets the agent as a whole, under the requests that are in progress, so that must be
    /// found out before it is asked.
    pub(super) fn check_grown_from(&self, before: &Metadata<'_>) -> Result<(), String> {
        if self.agent_name != before.agent_name {
            return Err(format!("it is that of {}, not of {}", self.agent_name, before.agent_name));
        }
        if !self.connections.is_superset(&before.connections) {
            return Err("its way to reach the agent is another than before".to_owned());
        }
        if !self.memory.is_superset(&before.memory) {
            return Err("it lacks memory that it had before, or has it under another key".to_owned());
        }
        Ok(())
    }
}

/// What an agent wrote, or what was seen and what was expected.
pub(super) fn check_metadata(bytes: &[u8]) -> Result<Metadata<'_>, String> {
    if bytes.len() > METADATA_LEN_BYTES_MAX {
        return Err(format!("{} bytes, expected at most {METADATA_LEN_BYTES_MAX}", bytes.len()));
    }
    let rest = bytes.strip_prefix(INTRO).ok_or_else(|| "it is not what NIXL writes: no \"nixlSerDes|\"".to_owned())?;
    let mut reader = MetadataReader { rest };
    let agent_name = reader.record("Agent")?;
    if agent_name.is_empty() || agent_name.len() > AGENT_NAME_LEN_BYTES_MAX || agent_name.contains(&0) {
        return Err(format!("an agent's name of {} bytes", agent_name.len()));
    }
    let agent_name = std::str::from_utf8(agent_name).map_err(|error| format!("an agent's name: {error}"))?;
    let mut connections = BTreeSet::new();
    for _ in 0..reader.count("Conns", PARTS_MAX)? {
        connections.insert((reader.some("t")?, reader.some("c")?));
    }
    if reader.record("")? != b"MemSection" {
        return Err("no section for memory".to_owned());
    }
    let mut memory = BTreeSet::new();
    for _ in 0..reader.count("nixlSecElms", PARTS_MAX)? {
        let backend = reader.some("bknd")?;
        if reader.record("nixlDList")? != b"nixlSDList" {
            return Err("a list of ranges of another kind".to_owned());
        }
        // NIXL takes it for an index without looking, and dies.
        let type_bytes = reader.record("t")?;
        let memory_type = <[u8; 4]>::try_from(type_bytes).map(u32::from_le_bytes);
        if !memory_type.is_ok_and(|memory_type| memory_type < MEMORY_TYPE_COUNT) {
            return Err(format!("a memory type of {memory_type:?}, expected a number below {MEMORY_TYPE_COUNT}"));
        }
        for _ in 0..reader.count("n", METADATA_LEN_BYTES_MAX as u64)? {
            let range = reader.record("")?;
            if range.len() <= RANGE_LEN_BYTES {
                return Err("a range of memory without a key".to_owned());
            }
            memory.insert((backend, type_bytes, range));
        }
    }
    // Written by later versions.
    if !reader.rest.is_empty() {
        for _ in 0..reader.count("UserMDs", PARTS_MAX)? {
            reader.some("k")?;
            reader.record("v")?;
        }
    }
    if !reader.rest.is_empty() {
        return Err(format!("{} bytes too many", reader.rest.len()));
    }
    Ok(Metadata { agent_name, connections, memory })
}

struct MetadataReader<'a> {
    rest: &'a [u8],
}

impl<'a> MetadataReader<'a> {
    fn record(&mut self, tag: &str) -> Result<&'a [u8], String> {
        let cut = || format!("it ends, or says something else, where {tag:?} was expected");
        let rest = self.rest.strip_prefix(tag.as_bytes()).ok_or_else(cut)?;
        let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(cut)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| cut())?;
        let (value, rest) = rest.split_at_checked(len).ok_or_else(cut)?;
        self.rest = rest.strip_prefix(b"|").ok_or_else(cut)?;
        Ok(value)
    }

    fn some(&mut self, tag: &str) -> Result<&'a [u8], String> {
        match self.record(tag)? {
            [] => Err(format!("{tag:?} is empty")),
            value => Ok(value),
        }
    }

    fn count(&mut self, tag: &str, max: u64) -> Result<u64, String> {
        let value = self.record(tag)?;
        let count = <[u8; 8]>::try_from(value).map(u64::from_le_bytes);
        match count {
            Ok(count) if count <= max => Ok(count),
            _ => Err(format!("{tag:?} is {value:02x?}, expected a number up to {max}")),
        }
    }
}

/// As an agent with one backend writes it.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn sample_metadata(connection: &[u8], ranges: &[u8]) -> Vec<u8> {
    let head = [
        INTRO.to_vec(),
        record("Agent", b"receiver-1"),
        count("Conns", 1),
        record("t", b"UCX"),
        record("c", connection),
        record("", b"MemSection"),
        count("nixlSecElms", 1),
        record("bknd", b"UCX"),
        record("nixlDList", b"nixlSDList"),
        record("t", &[0; 4]),
        count("n", ranges.len() as u64),
    ];
    let records = ranges.iter().flat_map(|&range| record("", &[range; RANGE_LEN_BYTES + 11]));
    head.concat().into_iter().chain(records).collect()
}

#[cfg(any(test, feature = "fuzzing"))]
fn record(tag: &str, value: &[u8]) -> Vec<u8> {
    [tag.as_bytes(), &(value.len() as u64).to_le_bytes(), value, b"|"].concat()
}

#[cfg(any(test, feature = "fuzzing"))]
fn count(tag: &str, count: u64) -> Vec<u8> {
    record(tag, &count.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As an agent with one backend and two ranges writes it.
    fn sample() -> Vec<u8> {
        sample_metadata(b"an address of UCX", &[1, 2])
    }

    #[test]
    fn only_more_of_the_same_is_given_to_nixl_for_a_peer_that_it_knows() {
        // Broken in production: one odd update makes NIXL forget a peer while requests to it are in progress.
        let before = sample();
        let grown = |after: &[u8]| check_metadata(after).unwrap().check_grown_from(&check_metadata(&before).unwrap());
        assert_eq!(grown(&before), Ok(()));
        assert_eq!(grown(&sample_metadata(b"an address of UCX", &[2, 9, 1])), Ok(()), "in any order");
        assert!(grown(&sample_metadata(b"an address of UCX", &[2, 9])).unwrap_err().contains("lacks memory"));
        assert!(grown(&sample_metadata(b"another address", &[1, 2, 9])).unwrap_err().contains("way to reach"));
    }

    #[test]
    fn what_nixl_writes_is_accepted_and_names_its_agent() {
        // Broken in production: no peer can be connected any more.
        assert_eq!(check_metadata(&sample()).unwrap().agent_name, "receiver-1");
        let later = [sample(), count("UserMDs", 1), record("k", b"key"), record("v", b"")].concat();
        assert_eq!(check_metadata(&later).unwrap().agent_name, "receiver-1");
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        // Broken in production: a length from the network becomes an offset inside NIXL's reader.
        let good = sample();
        for len in 0..good.len() {
            assert!(check_metadata(&good[..len]).is_err(), "{len}");
        }
        assert!(check_metadata(&[good.clone(), vec![b'|']].concat()).is_err());
        let memory_type = good.windows(4).position(|window| window == b"|t\x04\0").unwrap() + 10;
        let lengths = good.windows(5).position(|window| window == b"Conns").unwrap() + 5;
        for (at, byte) in
            [(lengths, 9), (lengths + 7, 0xff), (lengths + 8, 65), (memory_type, 5), (memory_type + 3, 0x81)]
        {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(check_metadata(&bad).is_err(), "{at}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_end_the_process(tail in prop::collection::vec(any::<u8>(), 0..80), keep in 0_usize..300) {
            // Broken in production: one malformed handshake takes the daemon down.
            let good = sample();
            let head = &good[..keep.min(good.len())];
            let _ = check_metadata(&[head, &tail].concat());
        }
    }
}
