//! Who owns the pd_buffer's memory, hands out blocks of it, and lets it grow.

use std::fmt::{self, Display};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Block, BlockLayout, BufferError, CudaDevice, CudaMemory, HostMemory, MachineSteps, Memory, StepSource};
use crate::address::{AddressError, AddressManager, Usage};

/// Has a range registered with whoever must know of it before anybody uses it. What it says when it refuses goes into
/// [`BufferError::Step`].
pub type Registrar = Box<dyn FnMut(Range<u64>) -> Result<(), String> + Send>;

/// How long a buffer is, becomes and may become. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOptions {
    /// How long it may become: as long as the mapping is, here and in every process that maps it.
    pub ceiling_bytes: u64,
    /// How long it is at first: whole slots, at least one. The ceiling: eager.
    pub initial_bytes: u64,
    /// What a step adds: whole slots, at least one. The last step ends at the ceiling.
    pub step_bytes: u64,
    /// Blocks start at multiples of it.
    pub alignment: u64,
    /// The length that most blocks have, a multiple of the alignment.
    pub slot_bytes: u64,
}

impl MemoryOptions {
    /// All of it from the start.
    pub const fn eager(len_bytes: u64, alignment: u64, slot_bytes: u64) -> Self {
        Self { ceiling_bytes: len_bytes, initial_bytes: len_bytes, step_bytes: slot_bytes, alignment, slot_bytes }
    }

    fn check(&self) -> Result<(), BufferError> {
        let Self { ceiling_bytes, initial_bytes, step_bytes, slot_bytes, .. } = *self;
        let refuse = |reason| Err(BufferError::Options { initial_bytes, step_bytes, ceiling_bytes, reason });
        if initial_bytes == 0 || step_bytes == 0 || slot_bytes == 0 {
            return refuse("none of the lengths may be 0");
        }
        if initial_bytes > ceiling_bytes {
            return refuse("it begins above its ceiling");
        }
        let whole = |len_bytes: u64| len_bytes.is_multiple_of(slot_bytes);
        if initial_bytes < ceiling_bytes && !(whole(initial_bytes) && whole(step_bytes)) {
            return refuse("steps are whole slots");
        }
        Ok(())
    }
}

/// How full the buffer is, all of one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUsage {
    /// What is there: used, free, and how long it is.
    pub present: Usage,
    /// How long it may become.
    pub ceiling_bytes: u64,
}

impl MemoryUsage {
    /// What it can still grow by.
    pub const fn growable_bytes(&self) -> u64 {
        self.ceiling_bytes - self.present.len_bytes
    }
}

/// The whole space, for registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Where it is in this process.
    pub address: u64,
    /// How long the mapping is. Only the first [`len_bytes`](Self::len_bytes) have pages.
    pub ceiling_bytes: u64,
    /// How much of it is in use or free to be used.
    pub len_bytes: u64,
}

/// The pd_buffer: memory, the addresses in it that are taken, and how it grows. Clones are handles of the same buffer.
///
/// Whoever keeps books of its own shares [`addresses`](Self::addresses); both then see one space, with one lock. The
/// memory itself lives as long as anybody holds it: the manager, a [`Block`], an engine.
#[derive(Clone)]
pub struct MemoryManager {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Arc<Memory>,
    addresses: AddressManager,
    options: MemoryOptions,
    steps: Box<dyn StepSource>,
    closed: AtomicBool,
    /// Held from before a step's first page until its addresses are there: one step at a time, while blocks go on being
    /// taken and given back.
    growth: Mutex<Growth>,
}

struct Growth {
    registrar: Option<Registrar>,
}

impl MemoryManager {
    /// A buffer in host memory: the ceiling's length mapped, the initial length populated.
    ///
    /// # Errors
    /// [`BufferError::Options`], or [`BufferError::Allocate`] when there is too little memory for the initial length.
    pub fn new(options: MemoryOptions) -> Result<Self, BufferError> {
        Self::with_steps(options, Box::new(MachineSteps))
    }

    /// The same with pages from somewhere else.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_steps(options: MemoryOptions, steps: Box<dyn StepSource>) -> Result<Self, BufferError> {
        options.check()?;
        let memory = Memory::Host(HostMemory::reserve(options.ceiling_bytes)?);
        Self::over(memory, options, steps)
    }

    /// A buffer in a GPU's memory, all of it from the start.
    ///
    /// # Errors
    /// [`BufferError::Options`] when it is to grow: memory that can be exported is allocated in one piece. What
    /// [`CudaMemory::allocate`] says.
    pub fn on_device(device: Arc<CudaDevice>, options: MemoryOptions) -> Result<Self, BufferError> {
        options.check()?;
        let MemoryOptions { ceiling_bytes, initial_bytes, step_bytes, .. } = options;
        if initial_bytes < ceiling_bytes {
            let reason = "GPU memory that other processes can open is allocated in one piece and does not grow";
            return Err(BufferError::Options { initial_bytes, step_bytes, ceiling_bytes, reason });
        }
        Self::over(Memory::Cuda(CudaMemory::allocate(device, ceiling_bytes)?), options, Box::new(MachineSteps))
    }

    fn over(memory: Memory, options: MemoryOptions, steps: Box<dyn StepSource>) -> Result<Self, BufferError> {
        let MemoryOptions { ceiling_bytes, initial_bytes, step_bytes, alignment, slot_bytes } = options;
        steps.populate(&memory, 0..initial_bytes)?;
        let addresses = AddressManager::with_slots(initial_bytes, alignment, slot_bytes).map_err(|_| {
            let reason = "an alignment divides a slot, and neither is 0";
            BufferError::Options { initial_bytes, step_bytes, ceiling_bytes, reason }
        })?;
        let shared = Shared {
            memory: Arc::new(memory),
            addresses,
            options,
            steps,
            closed: AtomicBool::new(false),
            growth: Mutex::new(Growth { registrar: None }),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Lets [`allocate`](Self::allocate) grow the buffer by itself, each step registered through this before its addresses
    /// exist. Without one it does not: growing is then the business of whoever calls [`grow_step`](Self::grow_step).
    pub fn grow_on_demand(&self, registrar: Registrar) {
        self.growth().registrar = Some(registrar);
    }

    /// Takes `count` blocks of that layout, or none. A count of 0 is an empty answer, also when full.
    ///
    /// # Errors
    /// [`BufferError::OutOfMemory`] when there is no room; [`BufferError::Step`] when the buffer could have grown and the
    /// step failed: no block is taken then, and a later request may succeed. [`BufferError::Closed`].
    pub fn allocate(&self, layout: &BlockLayout, count: usize) -> Result<Vec<Block>, BufferError> {
        let len_bytes = layout.len_bytes();
        if let Some(blocks) = self.try_allocate(len_bytes, count)? {
            return Ok(blocks);
        }
        let mut growth = self.growth();
        loop {
            // Again, now that nobody else grows: another request's step may have made room for this one.
            if let Some(blocks) = self.try_allocate(len_bytes, count)? {
                return Ok(blocks);
            }
            let usage = self.usage();
            let asked_bytes = u128::from(len_bytes) * count as u128;
            // What does not fit at the ceiling either grows nothing.
            let may_fit = asked_bytes <= u128::from(usage.present.free_bytes) + u128::from(usage.growable_bytes());
            let can_grow = may_fit && usage.growable_bytes() > 0;
            let Some(registrar) = growth.registrar.as_mut().filter(|_| can_grow) else {
                return Err(BufferError::OutOfMemory {
                    count,
                    len_bytes,
                    free_bytes: usage.present.free_bytes,
                    largest_free_bytes: usage.present.largest_free_bytes,
                    buffer_len_bytes: usage.present.len_bytes,
                    ceiling_bytes: usage.ceiling_bytes,
                });
            };
            self.step(registrar)?;
        }
    }

    /// The blocks, or `None` when there is no room for all of them now.
    fn try_allocate(&self, len_bytes: u64, count: usize) -> Result<Option<Vec<Block>>, BufferError> {
        if self.is_closed() {
            return Err(BufferError::Closed);
        }
        let Shared { addresses, memory, .. } = &*self.shared;
        match addresses.allocate_batch(len_bytes, count) {
            Ok(ranges) => {
                let block = |range| Block::new(range, addresses.clone(), Arc::clone(memory));
                Ok(Some(ranges.into_iter().map(block).collect()))
            }
            Err(AddressError::OutOfMemory { .. }) => Ok(None),
            Err(AddressError::Closed) => Err(BufferError::Closed),
            Err(error) => Err(BufferError::Layout { reason: format!("{len_bytes} bytes ({error})") }),
        }
    }

    /// Gives blocks back, in any order, under one lock. Dropping them does the same one by one.
    pub fn free(&self, blocks: Vec<Block>) {
        // A block of another buffer goes back to that one.
        let ranges: Vec<_> = blocks
            .into_iter()
            .filter(|block| Arc::ptr_eq(block.memory(), &self.shared.memory))
            .map(Block::into_range)
            .collect();
        if let Err(error) = self.shared.addresses.free_batch(&ranges) {
            debug_assert!(false, "blocks are freed once, by their owner: {error}");
            tracing::error!(%error, "blocks of the pd_buffer cannot be given back");
        }
    }

    /// Adds the next step: its pages first, then `register`, and only then its addresses, so that nobody is handed a range
    /// that cannot be moved. The range that was added.
    ///
    /// # Errors
    /// [`BufferError::Step`] when there is too little memory or `register` refuses: everything is as it was, and a later
    /// attempt may succeed. [`BufferError::AtCeiling`], [`BufferError::Closed`].
    pub fn grow_step<E: Display>(
        &self,
        register: impl FnOnce(Range<u64>) -> Result<(), E>,
    ) -> Result<Range<u64>, BufferError> {
        // Held until the end of the step.
        let _growth = self.growth();
        self.step(register)
    }

    /// One step, by whoever holds the lock on growth.
    fn step<E: Display>(&self, register: impl FnOnce(Range<u64>) -> Result<(), E>) -> Result<Range<u64>, BufferError> {
        if self.is_closed() {
            return Err(BufferError::Closed);
        }
        let Shared { memory, addresses, steps, options, .. } = &*self.shared;
        let usage = addresses.usage();
        let ceiling_bytes = options.ceiling_bytes;
        let start = usage.len_bytes;
        let range = start..start.saturating_add(options.step_bytes).min(ceiling_bytes);
        let step_bytes = range.end.saturating_sub(start);
        if step_bytes == 0 {
            return Err(BufferError::AtCeiling { ceiling_bytes });
        }
        let failed = |reason: String| BufferError::Step {
            step_bytes,
            buffer_len_bytes: usage.len_bytes,
            free_bytes: usage.free_bytes,
            reason,
        };
        steps.populate(memory, range.clone()).map_err(|error| failed(error.to_string()))?;
        let registered = register(range.clone()).map_err(|error| error.to_string());
        if let Err(reason) = registered.and_then(|()| addresses.grow(step_bytes).map_err(|error| error.to_string())) {
            // To the ceiling: nothing behind the step is in use, and its last page may end there.
            steps.release(memory, start..ceiling_bytes);
            return Err(failed(reason));
        }
        Ok(range)
    }

    /// Used, free and total, and the ceiling, all of one moment.
    pub fn usage(&self) -> MemoryUsage {
        MemoryUsage { present: self.shared.addresses.usage(), ceiling_bytes: self.shared.options.ceiling_bytes }
    }

    /// The whole space, for registration.
    pub fn space(&self) -> Space {
        let Shared { memory, addresses, options, .. } = &*self.shared;
        Space {
            address: memory.address(),
            ceiling_bytes: options.ceiling_bytes,
            len_bytes: addresses.usage().len_bytes,
        }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.shared.memory
    }

    /// The addresses, to be shared with whoever keeps books of what is in them. Growing them is this manager's business.
    pub fn addresses(&self) -> &AddressManager {
        &self.shared.addresses
    }

    /// What it was made with.
    pub fn options(&self) -> &MemoryOptions {
        &self.shared.options
    }

    /// Checks that the addresses tile the space, and that the space is between its first length and its ceiling.
    ///
    /// # Errors
    /// What was found, for a log line or a failing test.
    pub fn check(&self) -> Result<(), String> {
        let Shared { memory, addresses, options, .. } = &*self.shared;
        addresses.check()?;
        let len_bytes = addresses.usage().len_bytes;
        let MemoryOptions { initial_bytes, ceiling_bytes, .. } = *options;
        if len_bytes < initial_bytes || len_bytes > ceiling_bytes || memory.len_bytes() != ceiling_bytes {
            return Err(format!(
                "{len_bytes} bytes of addresses, expected {initial_bytes} to {ceiling_bytes}; {} are mapped",
                memory.len_bytes()
            ));
        }
        Ok(())
    }

    /// Refuses blocks and steps from now on. Blocks that are out stay what they are until they are dropped.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        // For those who keep books of their own.
        self.shared.addresses.close();
    }

    /// Whether it has been closed.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    fn growth(&self) -> MutexGuard<'_, Growth> {
        // A registrar that panicked has left the addresses alone.
        self.shared.growth.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for MemoryManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryManager")
            .field("options", &self.shared.options)
            .field("usage", &self.shared.addresses.usage())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize};
    use std::thread;

    use super::*;

    const SLOT: u64 = 4096;

    fn lazy(initial_slots: u64, step_slots: u64, ceiling_slots: u64) -> MemoryOptions {
        MemoryOptions {
            ceiling_bytes: ceiling_slots * SLOT,
            initial_bytes: initial_slots * SLOT,
            step_bytes: step_slots * SLOT,
            alignment: 256,
            slot_bytes: SLOT,
        }
    }

    fn slot() -> BlockLayout {
        BlockLayout::of_bytes(SLOT).unwrap()
    }

    fn present_bytes(manager: &MemoryManager) -> u64 {
        let Memory::Host(host) = &**manager.memory() else { panic!("it is host memory") };
        host.present_bytes()
    }

    /// Memory that is short `failures` times, with a record of what was populated and released.
    #[derive(Debug, Default)]
    struct Short {
        failures: AtomicUsize,
        released: AtomicU64,
    }

    impl StepSource for Arc<Short> {
        fn populate(&self, memory: &Memory, range: Range<u64>) -> Result<(), BufferError> {
            let left = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if left.is_ok() {
                let len_bytes = range.end - range.start;
                return Err(BufferError::Allocate { len_bytes, reason: "17 bytes are free".to_owned() });
            }
            MachineSteps.populate(memory, range)
        }

        fn release(&self, memory: &Memory, range: Range<u64>) {
            self.released.fetch_add(1, Ordering::SeqCst);
            MachineSteps.release(memory, range);
        }
    }

    #[test]
    fn an_eager_buffer_is_there_at_once_and_full_is_full() {
        // Broken in production: a request is granted blocks that do not exist, or a full buffer waits for growth.
        let manager = MemoryManager::new(MemoryOptions::eager(4 * SLOT, 256, SLOT)).unwrap();
        assert_eq!(present_bytes(&manager), 4 * SLOT);
        let blocks = manager.allocate(&slot(), 3).unwrap();
        let usage = manager.usage();
        assert_eq!((usage.present.used_bytes, usage.present.free_bytes, usage.growable_bytes()), (3 * SLOT, SLOT, 0));
        let error = manager.allocate(&slot(), 2).unwrap_err();
        assert!(matches!(error, BufferError::OutOfMemory { count: 2, free_bytes: SLOT, .. }), "{error}");
        assert_eq!(manager.usage(), usage, "all or nothing");
        assert!(manager.allocate(&slot(), 0).unwrap().is_empty());
        let error = manager.grow_step(|_| Ok::<_, String>(())).unwrap_err();
        assert!(matches!(error, BufferError::AtCeiling { .. }), "{error}");
        manager.free(blocks);
        assert_eq!(manager.usage().present.largest_free_bytes, 4 * SLOT);
        manager.check().unwrap();
    }

    #[test]
    fn a_lazy_buffer_grows_when_it_is_needed_and_tells_before_it_hands_out() {
        // Broken in production: a chunk is written to a range that no engine has registered.
        let manager = MemoryManager::new(lazy(2, 3, 9)).unwrap();
        assert_eq!(present_bytes(&manager), 2 * SLOT);
        let first = manager.allocate(&slot(), 2).unwrap();
        let error = manager.allocate(&slot(), 1).unwrap_err();
        assert!(matches!(error, BufferError::OutOfMemory { .. }), "nobody to register with: {error}");
        let told = Arc::new(Mutex::new(Vec::new()));
        let (listener, addresses) = (Arc::clone(&told), manager.addresses().clone());
        manager.grow_on_demand(Box::new(move |range| {
            assert_eq!(addresses.usage().len_bytes, range.start, "the addresses come last");
            listener.lock().unwrap().push(range);
            Ok(())
        }));
        let more = manager.allocate(&slot(), 5).unwrap();
        assert_eq!(*told.lock().unwrap(), [2 * SLOT..5 * SLOT, 5 * SLOT..8 * SLOT]);
        assert_eq!(present_bytes(&manager), 8 * SLOT);
        let error = manager.allocate(&slot(), 3).unwrap_err();
        assert!(matches!(error, BufferError::OutOfMemory { .. }), "more than the ceiling has: {error}");
        assert_eq!(manager.usage().present.len_bytes, 8 * SLOT, "and nothing has grown for it");
        let last = manager.allocate(&slot(), 2).unwrap();
        assert_eq!(manager.usage().growable_bytes(), 0, "the last step ends at the ceiling");
        for (number, block) in first.iter().chain(&more).chain(&last).enumerate() {
            block.write(0, &[number as u8; SLOT as usize]).unwrap();
        }
        for (number, block) in first.iter().chain(&more).chain(&last).enumerate() {
            let mut seen = [0; SLOT as usize];
            block.read(0, &mut seen).unwrap();
            assert_eq!(seen, [number as u8; SLOT as usize]);
        }
        assert_eq!(manager.space().len_bytes, manager.space().ceiling_bytes);
        manager.check().unwrap();
    }

    #[test]
    fn a_step_that_fails_is_an_answer_and_the_next_one_may_succeed() {
        // Broken in production: a machine that is short of memory for a moment ends the daemon, or leaves it unable to
        // grow ever again.
        let short = Arc::new(Short::default());
        let manager = MemoryManager::with_steps(lazy(1, 2, 5), Box::new(Arc::clone(&short))).unwrap();
        manager.grow_on_demand(Box::new(|_| Ok(())));
        let held = manager.allocate(&slot(), 1).unwrap();
        let before = manager.usage();
        short.failures.store(1, Ordering::SeqCst);
        let error = manager.allocate(&slot(), 1).unwrap_err();
        let text = error.to_string();
        let asked = 2 * SLOT;
        assert!(matches!(error, BufferError::Step { step_bytes, free_bytes: 0, .. } if step_bytes == asked), "{text}");
        assert!(text.contains("17 bytes are free"), "{text}");
        assert_eq!(manager.usage(), before);
        let refused = manager.grow_step(|_| Err("the engine has no more keys")).unwrap_err().to_string();
        assert!(refused.contains("no more keys"), "{refused}");
        assert_eq!(manager.usage(), before);
        assert_eq!((present_bytes(&manager), short.released.load(Ordering::SeqCst)), (SLOT, 1), "its pages went back");
        assert_eq!(manager.allocate(&slot(), 2).unwrap().len(), 2);
        drop(held);
        manager.check().unwrap();
    }

    #[test]
    fn more_than_the_machine_has_is_an_error_of_the_step() {
        // Broken in production: the kernel kills the daemon, or a neighbour, when the buffer grows.
        let options = MemoryOptions { ceiling_bytes: 1 << 44, step_bytes: 1 << 43, ..lazy(1, 1, 1) };
        let manager = MemoryManager::new(options).unwrap();
        let error = manager.grow_step(|_| Ok::<_, String>(())).unwrap_err();
        assert!(matches!(error, BufferError::Step { .. }), "{error}");
        assert!(error.to_string().contains("bytes are free"), "{error}");
        assert_eq!((manager.usage().present.len_bytes, present_bytes(&manager)), (SLOT, SLOT));
    }

    #[test]
    fn a_closed_buffer_refuses_and_blocks_outlive_it() {
        // Broken in production: a transfer that is in flight at shutdown reads memory that has been unmapped.
        let manager = MemoryManager::new(lazy(2, 1, 4)).unwrap();
        manager.grow_on_demand(Box::new(|_| Ok(())));
        let mut blocks = manager.allocate(&slot(), 2).unwrap();
        manager.close();
        assert!(matches!(manager.allocate(&slot(), 1), Err(BufferError::Closed)));
        assert!(matches!(manager.grow_step(|_| Ok::<_, String>(())), Err(BufferError::Closed)));
        drop(blocks.pop());
        assert_eq!(manager.usage().present.free_bytes, SLOT, "giving back still works");
        let (addresses, memory) = (manager.addresses().clone(), Arc::downgrade(manager.memory()));
        drop(manager);
        let block = blocks.pop().unwrap();
        block.write(SLOT - 5, b"alive").unwrap();
        let mut seen = [0; 5];
        block.read(SLOT - 5, &mut seen).unwrap();
        assert_eq!(&seen, b"alive");
        assert!(matches!(block.write(SLOT - 4, b"alive"), Err(BufferError::OutOfRange { .. })));
        drop(block);
        assert_eq!(addresses.usage().used_bytes, 0);
        assert!(memory.upgrade().is_none(), "the last block takes the memory along");
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        // Broken in production: a step begins inside a slot, and a chunk has two registrations.
        for bad in [
            lazy(0, 1, 2),
            lazy(3, 1, 2),
            MemoryOptions { step_bytes: 0, ..lazy(1, 1, 2) },
            MemoryOptions { step_bytes: SLOT + 256, ..lazy(1, 1, 4) },
            MemoryOptions { initial_bytes: SLOT + 256, ..lazy(1, 1, 4) },
            MemoryOptions { slot_bytes: 0, ..lazy(1, 1, 2) },
            MemoryOptions { alignment: 0, ..lazy(1, 1, 2) },
        ] {
            let result = MemoryManager::new(bad);
            assert!(matches!(result, Err(BufferError::Options { .. })), "{bad:?}: {result:?}");
        }
    }

    /// Marks a block's bytes with `mark`, and looks later whether anybody else has been there.
    fn mark(block: &Block, mark: u64) {
        block.write(0, &mark.to_le_bytes()).unwrap();
        block.write(block.len_bytes() - 8, &mark.to_le_bytes()).unwrap();
    }

    fn is_marked(block: &Block, mark: u64) -> bool {
        [0, block.len_bytes() - 8].into_iter().all(|at| {
            let mut seen = [0; 8];
            block.read(at, &mut seen).unwrap();
            u64::from_le_bytes(seen) == mark
        })
    }

    /// Ten threads that take blocks of two lengths and give them back, some in batches.
    fn crowd(manager: &MemoryManager, rounds: u64) {
        thread::scope(|scope| {
            for thread in 0..10_u64 {
                scope.spawn(move || {
                    let lengths = [SLOT, SLOT / 4 + 16];
                    let mut held: Vec<(u64, Vec<Block>)> = Vec::new();
                    for round in 0..rounds {
                        let layout = BlockLayout::of_bytes(lengths[(thread + round) as usize % 2]).unwrap();
                        let count = (round % 4) as usize + 1;
                        let mark_of = thread << 32 | round;
                        match manager.allocate(&layout, count) {
                            Ok(blocks) => {
                                assert_eq!(blocks.len(), count);
                                blocks.iter().for_each(|block| mark(block, mark_of));
                                held.push((mark_of, blocks));
                            }
                            Err(BufferError::OutOfMemory { .. } | BufferError::Step { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                        if held.len() > 3 || round % 5 == 4 && !held.is_empty() {
                            let (mark_of, blocks) = held.swap_remove(round as usize % held.len());
                            assert!(blocks.iter().all(|block| is_marked(block, mark_of)), "two owners of one range");
                            if round % 2 == 0 {
                                manager.free(blocks);
                            }
                        }
                    }
                    for (mark_of, blocks) in held {
                        assert!(blocks.iter().all(|block| is_marked(block, mark_of)), "two owners of one range");
                    }
                });
            }
        });
        manager.check().unwrap();
        assert_eq!(manager.usage().present.used_bytes, 0);
        assert_eq!(manager.usage().present.largest_free_bytes, manager.usage().present.len_bytes);
    }

    #[test]
    fn ten_threads_never_share_a_byte() {
        // Broken in production: two requests are granted one slot, and one decodes the other's prompt.
        let manager = MemoryManager::new(MemoryOptions::eager(64 * SLOT, 16, SLOT)).unwrap();
        crowd(&manager, 400);
    }

    #[test]
    fn it_grows_under_ten_threads_while_some_steps_fail() {
        // Broken in production: growing while requests come and go hands a range out twice, or loses it.
        let short = Arc::new(Short::default());
        let manager = MemoryManager::with_steps(lazy(2, 2, 64), Box::new(Arc::clone(&short))).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let listener = Arc::clone(&told);
        let turn = AtomicU64::new(0);
        manager.grow_on_demand(Box::new(move |range| {
            if turn.fetch_add(1, Ordering::SeqCst) % 3 == 1 {
                return Err("not this time".to_owned());
            }
            listener.lock().unwrap().push(range);
            Ok(())
        }));
        short.failures.store(3, Ordering::SeqCst);
        crowd(&manager, 400);
        // However far the crowd got: the rest of it comes, sooner or later.
        let everything = loop {
            match manager.allocate(&slot(), 64) {
                Ok(blocks) => break blocks,
                Err(BufferError::Step { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(everything.len(), 64);
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 31);
        let mut end = 2 * SLOT;
        for range in &*told {
            assert_eq!(range.start, end, "steps follow each other");
            end = range.end;
        }
        assert_eq!((manager.usage().present.len_bytes, end), (64 * SLOT, 64 * SLOT));
    }
}
