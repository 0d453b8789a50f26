//! The writing side: an engine, its memory, and what the receiver's memory should hold.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pd_backend::buffer::{HostMemory, Memory};
use pd_backend::ids::{ConnectionId, TransferId};
use pd_backend::transfer::{Backoff, ByteCopy, Completion, EngineKind, TransferEngine, TransferError, Wait};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::engine;
use super::receiver::Receiver;

const COMPLETION_MAX: Duration = Duration::from_secs(60);

/// An engine with registered memory full of random bytes.
pub struct Sender {
    /// The engine.
    pub engine: Box<dyn TransferEngine>,
    /// Its memory.
    pub memory: Arc<Memory>,
    /// What is in there.
    pub source: Vec<u8>,
    transfers: u64,
}

impl Sender {
    /// With `len_bytes` of memory.
    pub fn start(kind: EngineKind, len_bytes: u64, unit_bytes: u64) -> Self {
        let memory = HostMemory::allocate(len_bytes).expect("the test's buffer fits");
        let source = random_bytes(len_bytes, 1);
        memory.write(0, &source).expect("all of it");
        let mut engine = engine(kind, "sender");
        let memory = Arc::new(Memory::Host(memory));
        engine.register(Arc::clone(&memory), unit_bytes).expect("it registers");
        Self { engine, memory, source, transfers: 0 }
    }

    /// The whole handshake.
    pub fn connect(&mut self, receiver: &mut Receiver) -> ConnectionId {
        let ours = self.engine.export().expect("it exports");
        receiver.load_peer(&ours);
        let theirs = &receiver.export;
        let connection = self.engine.load_peer(&theirs.agent_name, &theirs.metadata).expect("it loads");
        self.engine.connect(connection, &theirs.descriptors).expect("it connects");
        connection
    }

    /// A name that was not used before.
    pub fn next_transfer(&mut self) -> TransferId {
        self.transfers += 1;
        TransferId(self.transfers)
    }

    /// Polls, politely, until `count` transfers have ended.
    pub fn completions(&mut self, count: usize) -> Vec<Completion> {
        let started = Instant::now();
        let mut backoff = Backoff::new();
        let mut completions = Vec::new();
        while completions.len() < count {
            assert!(started.elapsed() < COMPLETION_MAX, "{} of {count} transfers ended", completions.len());
            let before = completions.len();
            self.engine.poll(&mut completions);
            match backoff.next(completions.len() > before || self.engine.has_work()) {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => std::thread::yield_now(),
                Wait::Sleep(time) => std::thread::sleep(time),
            }
        }
        completions
    }

    /// Posts the copies and waits for their end.
    pub fn ship(&mut self, connection: ConnectionId, copies: &[ByteCopy]) -> Result<(), TransferError> {
        let transfer = self.next_transfer();
        self.engine.post(transfer, connection, copies)?;
        let completion = self.completions(1).remove(0);
        assert_eq!(completion.transfer, transfer);
        assert_eq!(self.engine.in_flight(), 0);
        completion.result
    }
}

/// What a receiver's memory should hold: filled with other random bytes at first.
pub struct Expected(Vec<u8>);

impl Expected {
    /// Fills the receiver's memory.
    pub fn fill(receiver: &Receiver) -> Self {
        let bytes = random_bytes(receiver.mapping.len_bytes(), 2);
        receiver.mapping.write(0, &bytes).expect("all of it");
        Self(bytes)
    }

    /// What the copies do.
    pub fn apply(&mut self, source: &[u8], copies: &[ByteCopy]) {
        for copy in copies {
            let range = |offset: u64| offset as usize..(offset + copy.len_bytes) as usize;
            self.0[range(copy.remote_offset)].copy_from_slice(&source[range(copy.local_offset)]);
        }
    }

    /// Compares every byte.
    pub fn check(&self, receiver: &Receiver) {
        let mut seen = vec![0; self.0.len()];
        receiver.mapping.read(0, &mut seen).expect("all of it");
        let different = seen.iter().zip(&self.0).position(|(seen, expected)| seen != expected);
        assert_eq!(different, None, "first byte that differs");
    }
}

/// The same bytes for the same seed.
pub fn random_bytes(len_bytes: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes as usize];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
