//! What is really so in the memory of one daemon, whatever its node believes: who was granted which bytes, which are staged,
//! who reads what.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pd_backend::ids::{ChunkKey, GrantId, LeaseId, RequestId};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What a chunk must hold: a function of its key alone, so that equal keys mean equal bytes.
pub fn content(key: &ChunkKey, len_bytes: u64) -> Vec<u8> {
    let seed = key
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len_bytes).map(|_| rng.random()).collect()
}

/// A grant as the receiver gave it.
#[derive(Debug)]
pub struct Grant {
    pub instance: String,
    pub request: RequestId,
    /// Its own chunks: where, and what.
    pub chunks: Vec<(Range<u64>, ChunkKey)>,
    /// Its sender has said that it is written or, of an LMCache sender's, a reader.
    pub committed: bool,
    /// It is a page of an LMCache sender's.
    pub page: bool,
}

/// What a reader was given.
#[derive(Debug)]
pub struct Leased {
    pub client: u64,
    pub chunks: Vec<(Range<u64>, ChunkKey)>,
}

/// One life of one daemon.
#[derive(Debug, Default)]
pub struct Truth {
    pub memory: Vec<u8>,
    /// In their order.
    pub grants: Vec<Grant>,
    /// Those that have a name.
    pub names: BTreeSet<GrantId>,
    /// The latest grant of each range that was ever granted, by its start: its end, and which.
    pub owners: BTreeMap<u64, (u64, usize)>,
    pub leases: BTreeMap<LeaseId, Leased>,
    /// What was staged for which attempt and is not filled yet.
    pub filling: Vec<(usize, Range<u64>)>,
    /// So many grants came before the latest reset: what they brought is void.
    pub void: usize,
}

fn overlap(left: &Range<u64>, right: &Range<u64>) -> bool {
    left.start < right.end && right.start < left.end
}

impl Truth {
    /// Bytes change hands. `in_use` are those that a write under way, a transfer from here or a connector uses, and which.
    pub fn grant(
        &mut self,
        name: Option<GrantId>,
        grant: Grant,
        in_use: &[(Range<u64>, String)],
    ) -> Result<(), String> {
        if let Some(name) = name
            && !self.names.insert(name)
        {
            return Err(format!("grant {name} is given twice"));
        }
        for (range, _) in &grant.chunks {
            let taken = self.take(range, in_use);
            taken.map_err(|text| format!("granted to {} for {}: {text}", grant.instance, grant.request))?;
            self.owners.insert(range.start, (range.end, self.grants.len()));
        }
        self.grants.push(grant);
        Ok(())
    }

    /// A connector of this very daemon has filled these, to be parked: whoever reads them here reads what is its own.
    pub fn park(&mut self, instance: String, request: RequestId, chunks: Vec<(Range<u64>, ChunkKey)>) {
        for (range, _) in &chunks {
            self.owners.insert(range.start, (range.end, self.grants.len()));
        }
        self.grants.push(Grant { instance, request, chunks, committed: true, page: false });
    }

    /// Bytes that nobody uses, and that nobody owns any more: what was granted there, or was ready, is gone.
    pub fn take(&mut self, range: &Range<u64>, in_use: &[(Range<u64>, String)]) -> Result<(), String> {
        if let Some((used, user)) = in_use.iter().find(|(used, _)| overlap(used, range)) {
            return Err(format!("{range:?} is taken while {user} uses {used:?}"));
        }
        if let Some(lease) = self.leases.values().flat_map(|leased| &leased.chunks).find(|(r, _)| overlap(r, range)) {
            return Err(format!("{range:?} is taken while a reader holds {lease:?}"));
        }
        let overlapping = self.owners.range(..range.end).filter(|&(&start, &(end, _))| overlap(&(start..end), range));
        let gone: Vec<u64> = overlapping.map(|(&start, _)| start).collect();
        for start in gone {
            self.owners.remove(&start);
        }
        Ok(())
    }

    /// The serving engine resets its cache.
    pub fn reset(&mut self) {
        self.void = self.grants.len();
    }

    /// Whether what a reader is given now was granted since the latest reset.
    fn check_since_reset(&self, chunks: &[(Range<u64>, ChunkKey)]) -> Result<(), String> {
        for (range, key) in chunks {
            let grant = self.owners.get(&range.start).map(|(_, grant)| *grant);
            if grant.is_none_or(|grant| grant < self.void) {
                return Err(format!("{key} came with grant {grant:?}, before the reset that voids {}", self.void));
            }
        }
        Ok(())
    }

    /// A reader is given these. It, or another, has said of what came from LMCache senders that it is written.
    pub fn hand_out(
        &mut self,
        chunks: &[(Range<u64>, ChunkKey)],
        under_way: &[(Range<u64>, String)],
    ) -> Result<(), String> {
        for (range, key) in chunks {
            let owner = self.owners.get(&range.start).and_then(|&(_, grant)| self.grants.get_mut(grant));
            let Some(grant) = owner.filter(|grant| grant.page && !grant.committed) else { continue };
            grant.committed = true;
            let page = grant.chunks[0].0.clone();
            if let Some((write, writer)) = under_way.iter().find(|(write, _)| overlap(write, &page)) {
                return Err(format!("{key} of {} is read while {writer} still writes {write:?}", grant.request));
            }
        }
        self.verify(chunks)?;
        self.check_since_reset(chunks)
    }

    /// Whether `writer` may write these bytes now.
    pub fn check_write(&self, writer: &str, range: &Range<u64>) -> Result<(), String> {
        let owner = self.owners.range(..=range.start).next_back().filter(|(_, (end, _))| range.end <= *end);
        match owner.and_then(|(_, &(_, grant))| self.grants.get(grant)) {
            Some(grant) if grant.instance != writer => {
                Err(format!("{writer} writes {range:?}, which were granted to {} since", grant.instance))
            }
            Some(grant) if grant.committed => Err(format!("{writer} writes {range:?} after their commit")),
            None => Err(format!("{writer} writes {range:?}, which nobody was granted")),
            Some(_) => match self.leases.values().flat_map(|leased| &leased.chunks).find(|(r, _)| overlap(r, range)) {
                Some(lease) => Err(format!("{writer} writes {range:?} while a reader holds {lease:?}")),
                None => Ok(()),
            },
        }
    }

    /// The receiver says that a request is ready.
    pub fn commit(
        &mut self,
        instance: &str,
        request: &RequestId,
        under_way: &[(Range<u64>, String)],
    ) -> Result<(), String> {
        let latest = self.grants.iter_mut().rev().find(|grant| grant.instance == instance && grant.request == *request);
        let Some(grant) = latest else { return Err(format!("{request} of {instance} is ready and was never granted")) };
        grant.committed = true;
        for (range, _) in &grant.chunks {
            if let Some((write, writer)) = under_way.iter().find(|(write, _)| overlap(write, range)) {
                return Err(format!("{request} is ready while {writer} still writes {write:?}"));
            }
        }
        let chunks = grant.chunks.clone();
        self.verify(&chunks)
    }

    pub fn verify(&self, chunks: &[(Range<u64>, ChunkKey)]) -> Result<(), String> {
        for (range, key) in chunks {
            let seen = &self.memory[range.start as usize..range.end as usize];
            let expected = content(key, range.end - range.start);
            if seen != expected {
                return Err(format!("{key} at {range:?} is {seen:?}; {expected:?} were sent"));
            }
        }
        Ok(())
    }
}
