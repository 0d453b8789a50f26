//! MessageBudget for what peers have sent, in bytes: what waits for the driver, and what waits for the engine's thread.
//!
//! A queue of messages is bounded by their number, and a message may have 20 MiB. So each message also takes bytes of a budget for what
//! it costs once it is decoded, and gives it back when it is dealt with. Where there are none left, the task that reads the
//! port waits, and its peers wait in the kernel.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::wire::{DecodeError, Message, decode, decoded_len_bytes};

/// For handshakes, which wait for the engine's thread as well: two that are as long as they may be.
const HANDSHAKES_LEN_BYTES_MAX: u32 = 48 * 1024 * 1024;
/// For everything else. It waits for the driver alone.
const MESSAGES_LEN_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// What some sockets share.
#[derive(Debug, Clone)]
pub(super) struct MessageBudgets {
    free: Arc<Semaphore>,
    len_bytes_max: u32,
}

/// What one message takes, until it is dropped.
#[derive(Debug)]
pub(super) struct MessageBudget(#[expect(dead_code, reason = "held, and given back by its drop")] OwnedSemaphorePermit);

impl MessageBudgets {
    /// For handshakes.
    pub(super) fn for_handshakes() -> Self {
        Self::new(HANDSHAKES_LEN_BYTES_MAX)
    }

    /// For everything else.
    pub(super) fn for_messages() -> Self {
        Self::new(MESSAGES_LEN_BYTES_MAX)
    }

    fn new(len_bytes_max: u32) -> Self {
        Self { free: Arc::new(Semaphore::new(len_bytes_max as usize)), len_bytes_max }
    }

    /// Decodes a message as soon as the budget has room for it. Whoever waits longest is next.
    pub(super) async fn decode(&self, payload: &[u8]) -> Result<(Message, MessageBudget), DecodeError> {
        let wanted = u32::try_from(decoded_len_bytes(payload)?).unwrap_or(u32::MAX).min(self.len_bytes_max);
        let taken = Arc::clone(&self.free).acquire_many_owned(wanted).await.expect("it is never closed");
        Ok((decode(payload)?, MessageBudget(taken)))
    }
}
