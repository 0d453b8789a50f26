//! Transfers that a GPU copies.

use super::LOCAL_ENGINE_NAME;
use super::cursor::Cursor;
use crate::buffer::{BufferError, CopyBatch};
use crate::ids::{ConnectionId, TransferId};
use crate::transfer::TransferError;

/// How many copies one `poll` starts of one transfer: each costs the calling thread some microseconds.
const COPIES_AT_ONCE_MAX: usize = 128;

/// A transfer under way. Its batch keeps both memories until the last copy has ended.
#[derive(Debug)]
pub(super) struct LocalFlight {
    pub(super) transfer: TransferId,
    pub(super) connection: ConnectionId,
    pub(super) agent_name: String,
    pub(super) copy_count: usize,
    cursor: Cursor,
    batch: CopyBatch,
    sealed: bool,
    /// The connection is gone: what was started ends, and counts for nothing.
    pub(super) leaving: bool,
}

impl LocalFlight {
    pub(super) fn new(
        transfer: TransferId,
        connection: ConnectionId,
        agent_name: String,
        cursor: Cursor,
        batch: CopyBatch,
    ) -> Self {
        let copy_count = cursor.copy_count();
        Self { transfer, connection, agent_name, copy_count, cursor, batch, sealed: false, leaving: false }
    }

    /// Whether there are copies to start.
    pub(super) const fn has_work(&self) -> bool {
        !self.sealed
    }

    /// Starts more copies, or looks whether they have ended: whether all have. A copy that holds up this thread is only
    /// started when none has before; it is told in `held_up`.
    pub(super) fn advance(&mut self, held_up: &mut bool) -> Result<bool, TransferError> {
        let failed =
            |error: BufferError| TransferError::Device { engine: LOCAL_ENGINE_NAME, reason: error.to_string() };
        if !self.sealed {
            let mut room = COPIES_AT_ONCE_MAX;
            while !self.leaving
                && room > 0
                && let Some(target_offset) = self.cursor.next_remote_offset()
            {
                let (len_bytes_max, goes_on) = self.batch.reach_at(target_offset);
                if !goes_on && std::mem::replace(held_up, true) {
                    break;
                }
                let Some(copy) = self.cursor.take(len_bytes_max) else { break };
                self.batch.push(copy.local_offset, copy.remote_offset, copy.len_bytes).map_err(failed)?;
                room -= 1;
            }
            if !self.leaving && !self.cursor.is_done() {
                return Ok(false);
            }
            self.batch.seal().map_err(failed)?;
            self.sealed = true;
        }
        self.batch.is_done().map_err(failed)
    }
}
