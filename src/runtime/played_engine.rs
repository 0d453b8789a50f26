//! A transfer engine for tests of the thread that owns one.

use std::ops::Range;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::buffer::Memory;
use crate::ids::{ByteCopy, ConnectionId, TransferId};
use crate::transfer::{Completion, Ended, Export, TransferEngine, TransferError};

/// An engine whose transfers end with the next poll, in which it can be kept.
#[derive(Debug)]
pub(super) struct PlayedEngine {
    pub(super) memory: Arc<Memory>,
    pub(super) posted: Arc<Mutex<Vec<TransferId>>>,
    pub(super) ended: Ended,
    /// A poll takes one; none: it takes as many as it likes.
    pub(super) gate: Option<mpsc::Receiver<()>>,
}

impl TransferEngine for PlayedEngine {
    fn name(&self) -> &'static str {
        "played"
    }

    fn linger(&self) -> Duration {
        Duration::ZERO
    }

    fn register(&mut self, _: Arc<Memory>, _: u64, _: u64) -> Result<(), TransferError> {
        Ok(())
    }

    fn extend(&mut self, _: Range<u64>) -> Result<Export, TransferError> {
        self.export()
    }

    fn export(&mut self) -> Result<Export, TransferError> {
        Err(TransferError::NotRegistered { engine: "played" })
    }

    fn load_peer(&mut self, _: &str, _: &[u8]) -> Result<ConnectionId, TransferError> {
        Ok(ConnectionId(1))
    }

    fn connect(&mut self, _: ConnectionId, _: &[u8]) -> Result<(), TransferError> {
        Ok(())
    }

    fn update_peer(&mut self, _: ConnectionId, _: &[u8], _: &[u8]) -> Result<(), TransferError> {
        Ok(())
    }

    /// Writes what it may not have read yet: whoever sums later sums something else.
    fn post(&mut self, transfer: TransferId, _: ConnectionId, copies: &[ByteCopy]) -> Result<(), TransferError> {
        for copy in copies {
            self.memory.write(copy.local_offset, &[0xff]).unwrap();
        }
        self.posted.lock().unwrap().push(transfer);
        self.ended.transfers.push(Completion { transfer, result: Ok(()) });
        Ok(())
    }

    fn poll(&mut self, ended: &mut Ended) {
        if let Some(gate) = &self.gate {
            gate.recv().unwrap();
        }
        ended.append(&mut self.ended);
    }

    fn in_flight(&self) -> usize {
        self.ended.len()
    }

    fn disconnect(&mut self, _: ConnectionId) {}
}
