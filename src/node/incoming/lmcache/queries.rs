//! LMCache's questions which chunks are ready. Its prefill side reads them from the buffer by page.

use std::collections::BTreeMap;

use super::super::{Incoming, IncomingTimer, Port};
use crate::ids::{ClientId, SlotIndex};
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::{CacheQueryRequest, CacheQueryResponse};

/// The client that holds the leases of queries. No client of the connector API has this number.
const QUERIES: ClientId = ClientId(u64::MAX);

impl<R: Clone + PartialEq> Incoming<R> {
    /// LMCache's question which chunks are held, by page, before it reads them. It takes no lease and never says when it has
    /// read, so they are held for as long as a write may take.
    pub(super) fn on_query(&mut self, core: &mut Core<R>, from: R, query: CacheQueryRequest) {
        let page_bytes = core.settings.chunk.slot_bytes;
        let known_bytes = self.lmcache.known_len_bytes.unwrap_or(0);
        let mut answer = CacheQueryResponse { cached_keys: Vec::new(), cached_indexes: Vec::new() };
        let mut pages = BTreeMap::new();
        // A question takes nothing from requests for long: half of the buffer stays for them.
        let room = self.pages_for_queries(core);
        for key in query.keys {
            let Some(slot) = core.slots.find(&key) else { continue };
            let start = core.slots.range(slot).map_or(1, |range| range.start);
            // Chunks of our own senders may lie across pages, or where its sender does not know any.
            if let Ok(page) = u32::try_from(start / page_bytes)
                && start.is_multiple_of(page_bytes)
                && start + page_bytes <= known_bytes
                && pages.len() < room
                && pages.insert(page, slot).is_none()
            {
                answer.cached_keys.push(key);
                answer.cached_indexes.push(page);
            }
        }
        if !pages.is_empty() {
            let held: Vec<SlotIndex> = pages.into_values().collect();
            for &slot in &held {
                core.slots.pin(slot);
            }
            let lease = self.leases.open(QUERIES, held);
            core.timers.set(IncomingTimer::Lease(QUERIES, lease), core.now + core.settings.write_timeout);
        }
        core.send(To::Route(from), Port::Query, Message::CacheQueryResponse(answer));
    }

    /// How many more pages may be held for those who only ask.
    fn pages_for_queries(&self, core: &Core<R>) -> usize {
        let held = self.leases.slots_of(QUERIES);
        let half = core.slots.addresses().len_bytes() / core.settings.chunk.slot_bytes / 2;
        usize::try_from(half).unwrap_or(usize::MAX).saturating_sub(held)
    }
}
