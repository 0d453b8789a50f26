//! Who owns the pd_buffer's memory, and lets it grow.

use std::fmt::{self, Display};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{BufferError, CudaDevice, CudaMemory, HostMemory, MachineSteps, Memory, StepSource};
use crate::address::{AddressManager, Usage};

/// How long a buffer is, becomes and may become. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOptions {
    /// How long it may become: as long as the mapping is, here and in every process that maps it.
    pub ceiling_bytes: u64,
    /// How long it is at first: whole slots, at least one. The ceiling: eager.
    pub initial_bytes: u64,
    /// What a step adds: whole slots, at least one. The last step ends at the ceiling.
    pub step_bytes: u64,
    /// Slots start at multiples of it.
    pub alignment: u64,
    /// The length that most slots have, a multiple of the alignment.
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

/// The pd_buffer: memory, the addresses in it that are taken, and how it grows. Clones are handles of the same buffer.
///
/// A node takes slots from [`addresses`](Self::addresses); both then see one space, with one lock. The memory itself
/// lives as long as anybody holds it: the manager, an engine.
#[derive(Clone)]
pub struct MemoryManager {
    shared: Arc<SharedMemory>,
}

struct SharedMemory {
    memory: Arc<Memory>,
    addresses: AddressManager,
    options: MemoryOptions,
    steps: Box<dyn StepSource>,
    /// Held from before a step's first page until its addresses are there: one step at a time, while slots go on being
    /// taken and given back.
    growth: Mutex<()>,
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
        let shared = SharedMemory { memory: Arc::new(memory), addresses, options, steps, growth: Mutex::new(()) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Adds the next step: its pages first, then `register`, and only then its addresses, so that nobody is handed a range
    /// that cannot be moved. The range that was added.
    ///
    /// # Errors
    /// [`BufferError::Step`] when there is too little memory or `register` refuses: everything is as it was, and a later
    /// attempt may succeed. [`BufferError::AtCeiling`].
    pub fn grow_step<E: Display>(
        &self,
        register: impl FnOnce(Range<u64>) -> Result<(), E>,
    ) -> Result<Range<u64>, BufferError> {
        // Held until the end of the step. A `register` that panicked has left the addresses alone.
        let _growth = self.shared.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let SharedMemory { memory, addresses, steps, options, .. } = &*self.shared;
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

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.shared.memory
    }

    /// The addresses, to be shared with whoever keeps books of what is in them. Growing them is this manager's business.
    pub fn addresses(&self) -> &AddressManager {
        &self.shared.addresses
    }

    /// Checks that the addresses tile the space, and that the space is between its first length and its ceiling.
    ///
    /// # Errors
    /// What was found, for a log line or a failing test.
    pub fn check(&self) -> Result<(), String> {
        let SharedMemory { memory, addresses, options, .. } = &*self.shared;
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
}

impl fmt::Debug for MemoryManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryManager")
            .field("options", &self.shared.options)
            .field("usage", &self.shared.addresses.usage())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    use std::thread;

    use super::*;
    use crate::address::AddressRange;

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

    /// A step that nobody has anything against.
    fn grow(manager: &MemoryManager) -> Result<Range<u64>, BufferError> {
        manager.grow_step(|_| Ok::<_, String>(()))
    }

    #[test]
    fn an_eager_buffer_is_there_at_once_and_full_is_full() {
        // Broken in production: a request is granted slots that do not exist, or a full buffer waits for growth.
        let manager = MemoryManager::new(MemoryOptions::eager(4 * SLOT, 256, SLOT)).unwrap();
        assert_eq!(present_bytes(&manager), 4 * SLOT);
        let slots = manager.addresses().allocate_each(&[SLOT; 4]).unwrap();
        let usage = manager.usage();
        assert_eq!((usage.present.used_bytes, usage.present.free_bytes, usage.growable_bytes()), (4 * SLOT, 0, 0));
        assert!(matches!(grow(&manager), Err(BufferError::AtCeiling { .. })));
        manager.addresses().free_batch(&slots).unwrap();
        assert_eq!(manager.usage().present.largest_free_bytes, 4 * SLOT);
        manager.check().unwrap();
    }

    #[test]
    fn a_lazy_buffer_grows_step_by_step_and_tells_before_it_hands_out() {
        // Broken in production: a chunk is written to a range that no engine has registered.
        let manager = MemoryManager::new(lazy(2, 3, 9)).unwrap();
        let mut slots = manager.addresses().allocate_each(&[SLOT; 2]).unwrap();
        for step in [2..5, 5..8, 8..9] {
            let step = step.start * SLOT..step.end * SLOT;
            assert_eq!(present_bytes(&manager), step.start);
            assert!(manager.addresses().allocate(SLOT).is_err(), "full");
            let register = |range: Range<u64>| {
                assert_eq!(range, step);
                assert_eq!(present_bytes(&manager), step.end, "the pages come first");
                assert_eq!(manager.addresses().len_bytes(), step.start, "the addresses come last");
                Ok::<_, String>(())
            };
            assert_eq!(manager.grow_step(register).unwrap(), step);
            let count = ((step.end - step.start) / SLOT) as usize;
            slots.extend(manager.addresses().allocate_each(&vec![SLOT; count]).unwrap());
        }
        assert_eq!(manager.usage().growable_bytes(), 0, "the last step ends at the ceiling");
        for (number, slot) in slots.iter().enumerate() {
            manager.memory().write(slot.start, &[number as u8; SLOT as usize]).unwrap();
        }
        for (number, slot) in slots.iter().enumerate() {
            let mut seen = [0; SLOT as usize];
            manager.memory().read(slot.start, &mut seen).unwrap();
            assert_eq!(seen, [number as u8; SLOT as usize]);
        }
        manager.check().unwrap();
    }

    #[test]
    fn a_step_that_fails_is_an_answer_and_the_next_one_may_succeed() {
        // Broken in production: a machine that is short of memory for a moment ends the daemon, or leaves it unable to
        // grow ever again.
        let short = Arc::new(Short::default());
        let manager = MemoryManager::with_steps(lazy(1, 2, 5), Box::new(Arc::clone(&short))).unwrap();
        manager.addresses().allocate(SLOT).unwrap();
        let before = manager.usage();
        short.failures.store(1, Ordering::SeqCst);
        let error = grow(&manager).unwrap_err();
        let text = error.to_string();
        let asked = 2 * SLOT;
        assert!(matches!(error, BufferError::Step { step_bytes, free_bytes: 0, .. } if step_bytes == asked), "{text}");
        assert!(text.contains("17 bytes are free"), "{text}");
        assert_eq!(manager.usage(), before);
        let refused = manager.grow_step(|_| Err("the engine has no more keys")).unwrap_err().to_string();
        assert!(refused.contains("no more keys"), "{refused}");
        assert_eq!(manager.usage(), before);
        assert_eq!((present_bytes(&manager), short.released.load(Ordering::SeqCst)), (SLOT, 1), "its pages went back");
        grow(&manager).unwrap();
        assert_eq!(manager.addresses().allocate_each(&[SLOT; 2]).unwrap().len(), 2);
        manager.check().unwrap();
    }

    #[test]
    fn more_than_the_machine_has_is_an_error_of_the_step() {
        // Broken in production: the kernel kills the daemon, or a neighbour, when the buffer grows.
        let options = MemoryOptions { ceiling_bytes: 1 << 44, step_bytes: 1 << 43, ..lazy(1, 1, 1) };
        let manager = MemoryManager::new(options).unwrap();
        let error = grow(&manager).unwrap_err();
        assert!(matches!(error, BufferError::Step { .. }), "{error}");
        assert!(error.to_string().contains("bytes are free"), "{error}");
        assert_eq!((manager.usage().present.len_bytes, present_bytes(&manager)), (SLOT, SLOT));
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

    #[test]
    fn it_grows_under_ten_threads_while_some_steps_fail() {
        // Broken in production: growing while requests come and go hands a range out twice, or loses it.
        let short = Arc::new(Short::default());
        let manager = MemoryManager::with_steps(lazy(2, 2, 64), Box::new(Arc::clone(&short))).unwrap();
        short.failures.store(3, Ordering::SeqCst);
        let told = Mutex::new(Vec::new());
        let turn = AtomicU64::new(0);
        let register = |range| {
            if turn.fetch_add(1, Ordering::SeqCst) % 3 == 1 {
                return Err("not this time");
            }
            told.lock().unwrap().push(range);
            Ok(())
        };
        thread::scope(|scope| {
            for thread in 1..=10_u8 {
                let (manager, register) = (&manager, &register);
                scope.spawn(move || {
                    for round in 0..400_usize {
                        let lens = vec![[SLOT, SLOT / 4 + 16][round % 2]; round % 4 + 1];
                        let Ok(ranges) = manager.addresses().allocate_each(&lens) else {
                            match manager.grow_step(register) {
                                Ok(_) | Err(BufferError::Step { .. } | BufferError::AtCeiling { .. }) => continue,
                                Err(error) => panic!("{error}"),
                            }
                        };
                        let owned: Vec<_> = ranges.iter().map(|range| manager.addresses().own(*range)).collect();
                        let ends = |range: &AddressRange| [range.start, range.end() - 1];
                        for at in ranges.iter().flat_map(ends) {
                            manager.memory().write(at, &[thread]).unwrap();
                        }
                        for at in ranges.iter().flat_map(ends) {
                            let mut seen = [0];
                            manager.memory().read(at, &mut seen).unwrap();
                            assert_eq!(seen, [thread], "two owners of one range");
                        }
                        drop(owned);
                    }
                });
            }
        });
        // However far they got: the rest of it comes, sooner or later.
        while !matches!(manager.grow_step(register), Err(BufferError::AtCeiling { .. })) {}
        assert_eq!(manager.addresses().allocate_each(&[SLOT; 64]).unwrap().len(), 64);
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 31);
        let mut end = 2 * SLOT;
        for range in &*told {
            assert_eq!(range.start, end, "steps follow each other");
            end = range.end;
        }
        assert_eq!((manager.usage().present.len_bytes, end), (64 * SLOT, 64 * SLOT));
        manager.check().unwrap();
    }
}
