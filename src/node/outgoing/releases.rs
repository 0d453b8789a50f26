//! What is parked and not wanted any more: it was sent, or its request has ended at decode.

use super::Outgoing;
use super::parking::ParkLease;
use super::registrants::Asked;
use super::requests::{OutgoingRequest, OutgoingStage};
use super::uid::Uid;
use crate::ids::{ChunkKey, RequestId};
use crate::node::core::Core;

impl<R: Clone> Outgoing<R> {
    /// Nobody asks any more for what was asked for so: those requests that have one of these names and end with this chunk. If
    /// there is none, the oldest that ends with it: whoever answered for a list, or for several samples, may have told the name of
    /// one of its requests alone. Others of the list are still to be asked for, and others that have the prompt are found until the
    /// room is needed.
    pub(super) fn release(&mut self, core: &mut Core<R>, asked: &Asked) {
        let named = |ids: &[RequestId]| ids.iter().any(|id| asked.names.contains(id));
        let Some(last) = &asked.last else {
            return self.release_parked(core, self.parked(|ids, _| named(ids)));
        };
        let mut released = self.parked(|ids, key| named(ids) && key == Some(last));
        if released.is_empty() {
            released = self.parked(|_, key| key == Some(last)).into_iter().take(1).collect();
        }
        self.release_parked(core, released);
    }

    /// Requests that are parked, or being parked, and not released yet, the oldest first, by what they are called and their last
    /// chunk; none of it where chunks are kept for a registration, and where nobody was told of them.
    fn parked(&self, is_meant: impl Fn(&[RequestId], Option<&ChunkKey>) -> bool) -> Vec<Uid> {
        let being_parked = |request: &OutgoingRequest| match &request.stage {
            OutgoingStage::Parking { ids, released: false, unsolicited, .. } => {
                is_meant(ids, request.keys.last().filter(|_| !unsolicited))
            }
            _ => false,
        };
        let leased = |lease: &ParkLease| is_meant(&lease.ids, lease.last.as_ref().filter(|_| !lease.unsolicited));
        let requests = self.requests.iter().filter(|(_, request)| being_parked(request)).map(|(&uid, _)| uid);
        let leases = self.park_leases.iter().filter(|(_, lease)| leased(lease)).map(|(&uid, _)| uid);
        let mut parked: Vec<Uid> = requests.chain(leases).collect();
        parked.sort_unstable();
        parked
    }

    fn release_parked(&mut self, core: &mut Core<R>, parked: Vec<Uid>) {
        for uid in parked {
            match self.requests.get_mut(&uid).map(|request| &mut request.stage) {
                Some(OutgoingStage::Parking { released, .. }) => *released = true,
                _ => self.end_park_lease(core, uid, true),
            }
        }
    }
}
