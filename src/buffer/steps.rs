//! Where the pages of a growing buffer come from.

use std::ops::Range;

use super::{BufferError, Memory};

/// Puts pages behind a range of the pd_buffer, and takes them away again. The one for the machine's own memory is
/// [`MachineSteps`]; tests have others, which fail when they are told to.
pub trait StepSource: std::fmt::Debug + Send + Sync {
    /// Makes every page of `range` present.
    ///
    /// # Errors
    /// [`BufferError::Allocate`] when there is too little memory. The range has no pages then.
    fn populate(&self, memory: &Memory, range: Range<u64>) -> Result<(), BufferError>;

    /// Gives the pages of a range back that nobody uses.
    fn release(&self, memory: &Memory, range: Range<u64>);
}

/// Pages of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct MachineSteps;

impl StepSource for MachineSteps {
    fn populate(&self, memory: &Memory, range: Range<u64>) -> Result<(), BufferError> {
        match memory {
            Memory::Host(host) => host.populate(range),
            // One allocation that is there from the start: a buffer there does not grow.
            Memory::Cuda(_) => Ok(()),
        }
    }

    fn release(&self, memory: &Memory, range: Range<u64>) {
        if let Memory::Host(host) = memory {
            host.release(range);
        }
    }
}
