//! The writing side: an engine, its memory, and what the receiver's memory should hold.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pd_backend::buffer::Memory;
use pd_backend::ids::{ConnectionId, TransferId};
use pd_backend::transfer::{
    Backoff, ByteCopy, Completion, Ended, EngineKind, Export, TransferEngine, TransferError, Wait,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::engine;
use super::memory::MemoryKind;
use super::receiver::Receiver;

/// `gpu` for a sender whose buffer is on a GPU.
pub const MEMORY_VARIABLE: &str = "PD_TEST_SENDER_MEMORY";

const COMPLETION_MAX: Duration = Duration::from_secs(240);

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
        Self::start_lazy(kind, len_bytes, len_bytes, unit_bytes)
    }

    /// The same, with only the first `registered_bytes` known to the engine.
    pub fn start_lazy(kind: EngineKind, len_bytes: u64, registered_bytes: u64, unit_bytes: u64) -> Self {
        let memory = MemoryKind::of_variable(MEMORY_VARIABLE).allocate(len_bytes, len_bytes);
        let source = random_bytes(len_bytes, 1);
        memory.write(0, &source).expect("all of it");
        let mut engine = engine(kind, "sender");
        engine.register(Arc::clone(&memory), unit_bytes, registered_bytes).expect("it registers");
        Self { source, ..Self::of(engine, memory) }
    }

    /// Around an engine that has registered that memory, whatever is in there.
    pub fn of(engine: Box<dyn TransferEngine>, memory: Arc<Memory>) -> Self {
        Self { engine, memory, source: Vec::new(), transfers: 0 }
    }

    /// The whole handshake.
    pub fn connect(&mut self, receiver: &mut Receiver) -> ConnectionId {
        let ours = self.engine.export().expect("it exports");
        receiver.load_peer(&ours);
        self.connect_to(&receiver.export)
    }

    /// Our side of it.
    pub fn connect_to(&mut self, theirs: &Export) -> ConnectionId {
        let connection = self.engine.load_peer(&theirs.agent_name, &theirs.metadata).expect("it loads");
        self.finish_connecting(connection, &theirs.descriptors).expect("it connects");
        connection
    }

    /// Step two, to its end.
    pub fn finish_connecting(&mut self, connection: ConnectionId, descriptors: &[u8]) -> Result<(), TransferError> {
        self.engine.connect(connection, descriptors)?;
        let mut ended = self.poll_until(|ended| !ended.connections.is_empty());
        assert!(ended.transfers.is_empty(), "{ended:?}");
        let connected = ended.connections.remove(0);
        assert_eq!((connected.connection, ended.connections.len()), (connection, 0));
        connected.result
    }

    /// Hears of what the receiver said last.
    pub fn update(&mut self, connection: ConnectionId, receiver: &Receiver) -> Result<(), TransferError> {
        self.engine.update_peer(connection, &receiver.export.metadata, &receiver.export.descriptors)
    }

    /// A name that was not used before.
    pub fn next_transfer(&mut self) -> TransferId {
        self.transfers += 1;
        TransferId(self.transfers)
    }

    /// Polls, politely, until `count` transfers have ended.
    pub fn completions(&mut self, count: usize) -> Vec<Completion> {
        let ended = self.poll_until(|ended| ended.transfers.len() >= count);
        assert!(ended.connections.is_empty(), "{ended:?}");
        ended.transfers
    }

    /// Polls, politely, until what has ended since is enough.
    pub fn poll_until(&mut self, is_enough: impl Fn(&Ended) -> bool) -> Ended {
        let started = Instant::now();
        let mut backoff = Backoff::new();
        let mut ended = Ended::default();
        while !is_enough(&ended) {
            assert!(started.elapsed() < COMPLETION_MAX, "no more than {ended:?} has ended");
            let before = ended.len();
            self.engine.poll(&mut ended);
            match backoff.next(ended.len() > before || self.engine.has_work()) {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => std::thread::yield_now(),
                Wait::Sleep(time) => std::thread::sleep(time),
            }
        }
        ended
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

    /// Those bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
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
        self.compare(&seen);
    }

    /// The same of memory of this process.
    pub fn check_own(&self, memory: &Memory) {
        let mut seen = vec![0; self.0.len()];
        memory.read(0, &mut seen).expect("all of it");
        self.compare(&seen);
    }

    fn compare(&self, seen: &[u8]) {
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
