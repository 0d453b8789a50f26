//! What a peer is told in step two: where our buffer is.

use serde::{Deserialize, Serialize};

use crate::transfer::ByteCopy;
use crate::transfer::blob::BlobKind;

const DESCRIPTORS: BlobKind = BlobKind { magic: b"pdnixldesc", version: 1 };

/// Host memory, in NIXL's numbering (`DRAM_SEG`).
pub(super) const MEMORY_TYPE_HOST: u32 = 0;

/// More units than this are not prepared: the lists would cost more memory than they save time.
const PREPARED_UNITS_MAX: u64 = 1 << 16;

/// How long the scratch memory is that every agent registers beside its buffer.
pub(super) const SCRATCH_LEN_BYTES: u64 = 4096;

/// One registered buffer, cut into units, and the scratch memory beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BufferDescriptor {
    /// Where it starts in the owner's address space.
    pub(super) address: u64,
    pub(super) len_bytes: u64,
    /// 0 for host memory.
    pub(super) device: u64,
    pub(super) memory_type: u32,
    /// The length that most copies have.
    pub(super) unit_bytes: u64,
    /// Host memory of [`SCRATCH_LEN_BYTES`] that nobody reads: where peers write to warm their connection.
    pub(super) scratch_address: u64,
}

impl BufferDescriptor {
    pub(super) fn encode(&self) -> Vec<u8> {
        DESCRIPTORS.encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let descriptor: Self = DESCRIPTORS.decode(bytes)?;
        if descriptor.memory_type != MEMORY_TYPE_HOST {
            return Err(format!("memory type {}, expected {MEMORY_TYPE_HOST} (host)", descriptor.memory_type));
        }
        let ranges = [(descriptor.address, descriptor.len_bytes), (descriptor.scratch_address, SCRATCH_LEN_BYTES)];
        for (address, len_bytes) in ranges {
            if len_bytes == 0 || address.checked_add(len_bytes).is_none() {
                return Err(format!("{len_bytes} bytes at address {address:#x}"));
            }
        }
        Ok(descriptor)
    }

    /// How many whole units to prepare; 0 when that is not worth it.
    pub(super) fn prepared_unit_count(&self) -> u64 {
        match self.len_bytes.checked_div(self.unit_bytes) {
            Some(count) if count <= PREPARED_UNITS_MAX => count,
            _ => 0,
        }
    }
}

/// Which units of the two buffers `copies` are, if each of them is exactly one. The ranges are inside the buffers.
pub(super) fn unit_indices(copies: &[ByteCopy], unit_bytes: u64) -> Option<(Vec<i32>, Vec<i32>)> {
    let index = |offset: u64| {
        if offset.is_multiple_of(unit_bytes) { i32::try_from(offset / unit_bytes).ok() } else { None }
    };
    let mut local = Vec::with_capacity(copies.len());
    let mut remote = Vec::with_capacity(copies.len());
    for copy in copies {
        if copy.len_bytes != unit_bytes {
            return None;
        }
        local.push(index(copy.local_offset)?);
        remote.push(index(copy.remote_offset)?);
    }
    Some((local, remote))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> BufferDescriptor {
        BufferDescriptor {
            address: 0x7000,
            len_bytes: 1000,
            device: 0,
            memory_type: 0,
            unit_bytes: 300,
            scratch_address: 0x9000,
        }
    }

    #[test]
    fn only_a_buffer_that_can_exist_is_accepted() {
        // Broken in production: bytes from the network become addresses that are written to.
        let good = descriptor();
        assert_eq!(BufferDescriptor::decode(&good.encode()), Ok(good));
        let refused = |bad: BufferDescriptor| BufferDescriptor::decode(&bad.encode()).unwrap_err();
        assert!(refused(BufferDescriptor { memory_type: 1, ..good }).contains("memory type 1"));
        assert!(refused(BufferDescriptor { len_bytes: 0, ..good }).contains("0 bytes"));
        assert!(refused(BufferDescriptor { len_bytes: u64::MAX, ..good }).contains("at address"));
        assert!(refused(BufferDescriptor { scratch_address: u64::MAX, ..good }).contains("4096 bytes at address"));
        assert!(BufferDescriptor::decode(b"pdlocaldesc").is_err());
        assert_eq!(good.prepared_unit_count(), 3);
        assert_eq!(BufferDescriptor { unit_bytes: 0, ..good }.prepared_unit_count(), 0);
        let huge = BufferDescriptor { len_bytes: 1 << 40, unit_bytes: 1, ..good };
        assert_eq!(huge.prepared_unit_count(), 0);
    }

    #[test]
    fn parts_of_units_are_not_taken_for_whole_ones() {
        // Broken in production: a partial push overwrites the whole slot.
        let copy = |local_offset, remote_offset, len_bytes| ByteCopy { local_offset, remote_offset, len_bytes };
        assert_eq!(unit_indices(&[copy(300, 0, 300), copy(0, 600, 300)], 300), Some((vec![1, 0], vec![0, 2])));
        assert_eq!(unit_indices(&[copy(300, 0, 299)], 300), None);
        assert_eq!(unit_indices(&[copy(300, 1, 300)], 300), None);
        assert_eq!(unit_indices(&[copy(1, 0, 300)], 300), None);
        assert_eq!(unit_indices(&[copy(0, 0, 600)], 300), None);
        assert_eq!(unit_indices(&[copy(1 << 40, 0, 1)], 1), None);
    }
}
