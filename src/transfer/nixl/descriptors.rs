//! What a peer is told in step two: where our buffer is.

use serde::{Deserialize, Serialize};

use crate::ids::BUFFER_PIECES_MAX;
use crate::transfer::ByteCopy;
use crate::transfer::blob::BlobKind;

const DESCRIPTORS: BlobKind = BlobKind { magic: b"pdnixldesc", version: 3 };

/// Host memory, in NIXL's numbering (`DRAM_SEG`).
pub(super) const MEMORY_TYPE_HOST: u32 = 0;
/// Memory of a GPU (`VRAM_SEG`).
pub(super) const MEMORY_TYPE_GPU: u32 = 1;

/// More units than this are not prepared: the lists would cost more memory than they save time.
const PREPARED_UNITS_MAX: u64 = 1 << 16;

/// How long the scratch memory is that every agent registers beside its buffer.
pub(super) const SCRATCH_LEN_BYTES: u64 = 4096;

/// One buffer, registered in pieces and cut into units, and the scratch memory beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NixlBuffer {
    /// Where it starts in the owner's address space.
    pub(super) address: u64,
    /// Where each registered piece ends, from the start of the buffer, in ascending order. The pieces lie side by side.
    pub(super) piece_ends: Vec<u64>,
    /// 0 for host memory; its owner's number for a GPU.
    pub(super) device: u64,
    pub(super) memory_type: u32,
    /// The length that most copies have.
    pub(super) unit_bytes: u64,
    /// Memory of the same kind, of [`SCRATCH_LEN_BYTES`], that nobody reads: where peers write to warm their
    /// connection. LMCache's peers have none.
    pub(super) scratch_address: Option<u64>,
}

impl NixlBuffer {
    pub(super) fn encode(&self) -> Vec<u8> {
        DESCRIPTORS.encode(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let descriptor: Self = DESCRIPTORS.decode(bytes)?;
        if !matches!(descriptor.memory_type, MEMORY_TYPE_HOST | MEMORY_TYPE_GPU) {
            return Err(format!(
                "memory type {}, expected {MEMORY_TYPE_HOST} (host) or {MEMORY_TYPE_GPU} (GPU)",
                descriptor.memory_type
            ));
        }
        let piece_count = descriptor.piece_ends.len();
        if piece_count > BUFFER_PIECES_MAX || !descriptor.piece_ends.is_sorted_by(|end, next| end < next) {
            return Err(format!(
                "{piece_count} pieces, expected at most {BUFFER_PIECES_MAX}, each behind the one before"
            ));
        }
        let first_end = descriptor.piece_ends.first().copied().unwrap_or(0);
        let buffer = [(descriptor.address, first_end), (descriptor.address, descriptor.len_bytes())];
        let scratch = descriptor.scratch_address.map(|address| (address, SCRATCH_LEN_BYTES));
        for (address, len_bytes) in buffer.into_iter().chain(scratch) {
            if len_bytes == 0 || address.checked_add(len_bytes).is_none() {
                return Err(format!("{len_bytes} bytes at address {address:#x}"));
            }
        }
        Ok(descriptor)
    }

    /// Says so unless this is memory of the same kind as `ours`.
    pub(super) fn check_kind(&self, ours: &Self) -> Result<(), String> {
        let name = |memory_type| if memory_type == MEMORY_TYPE_HOST { "host memory" } else { "GPU memory" };
        if self.memory_type == ours.memory_type {
            return Ok(());
        }
        Err(format!(
            "its buffer is {}, ours is {}, and this engine does not write from one to the other; give both the same \
             pd_buffer_device, or set transfer_channel: local on one host",
            name(self.memory_type),
            name(ours.memory_type)
        ))
    }

    /// Says so unless this is `before` with more pieces behind it, or the same.
    pub(super) fn check_grown_from(&self, before: &Self) -> Result<(), String> {
        let first = self.piece_ends.get(..before.piece_ends.len());
        if first != Some(&before.piece_ends)
            || *self != (Self { piece_ends: self.piece_ends.clone(), ..before.clone() })
        {
            return Err(format!(
                "{} bytes at {:#x} in {} pieces do not go on where {} bytes at {:#x} in {} pieces ended",
                self.len_bytes(),
                self.address,
                self.piece_ends.len(),
                before.len_bytes(),
                before.address,
                before.piece_ends.len()
            ));
        }
        Ok(())
    }

    /// How long it is, all pieces together.
    pub(super) fn len_bytes(&self) -> u64 {
        self.piece_ends.last().copied().unwrap_or(0)
    }

    /// Address and length of each piece.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        let starts = std::iter::once(0).chain(self.piece_ends.iter().copied());
        starts.zip(&self.piece_ends).map(|(start, end)| (self.address + start, end - start))
    }

    /// How many whole units to prepare; 0 when that is not worth it, or a unit would lie across two pieces.
    pub(super) fn prepared_unit_count(&self) -> u64 {
        let inner_ends = self.piece_ends.split_last().map_or(&[][..], |(_, inner)| inner);
        match self.len_bytes().checked_div(self.unit_bytes) {
            Some(count)
                if count <= PREPARED_UNITS_MAX && inner_ends.iter().all(|end| end.is_multiple_of(self.unit_bytes)) =>
            {
                count
            }
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

    fn descriptor() -> NixlBuffer {
        NixlBuffer {
            address: 0x7000,
            piece_ends: vec![1000],
            device: 0,
            memory_type: 0,
            unit_bytes: 300,
            scratch_address: Some(0x9000),
        }
    }

    #[test]
    fn only_a_buffer_that_can_exist_is_accepted() {
        // Broken in production: bytes from the network become addresses that are written to.
        let good = descriptor();
        assert_eq!(NixlBuffer::decode(&good.encode()).as_ref(), Ok(&good));
        let refused = |bad: NixlBuffer| NixlBuffer::decode(&bad.encode()).unwrap_err();
        assert!(refused(NixlBuffer { memory_type: 2, ..good.clone() }).contains("memory type 2"));
        let of_pieces = |piece_ends: &[u64]| NixlBuffer { piece_ends: piece_ends.to_vec(), ..descriptor() };
        assert!(refused(of_pieces(&[])).contains("0 bytes"));
        assert!(refused(of_pieces(&[0, 5])).contains("0 bytes"));
        assert!(refused(of_pieces(&[u64::MAX])).contains("at address"));
        assert!(refused(of_pieces(&[500, 500])).contains("each behind the one before"));
        assert!(refused(of_pieces(&[500, 499, 600])).contains("each behind the one before"));
        let many: Vec<u64> = (1..=BUFFER_PIECES_MAX as u64 + 1).map(|piece| piece << 50).collect();
        assert!(refused(of_pieces(&many)).contains("257 pieces"));
        assert!(NixlBuffer::decode(&of_pieces(&many[..BUFFER_PIECES_MAX]).encode()).is_ok(), "it fits a blob");
        let elsewhere = NixlBuffer { scratch_address: Some(u64::MAX), ..good.clone() };
        assert!(refused(elsewhere).contains("4096 bytes at address"));
        assert!(NixlBuffer::decode(b"pdlocaldesc").is_err());
        let on_gpu = NixlBuffer { memory_type: MEMORY_TYPE_GPU, device: 3, ..good.clone() };
        assert_eq!(NixlBuffer::decode(&on_gpu.encode()).as_ref(), Ok(&on_gpu));
        let mixed = on_gpu.check_kind(&good).unwrap_err();
        assert!(mixed.contains("its buffer is GPU memory, ours is host memory"), "{mixed}");
        assert_eq!(on_gpu.check_kind(&on_gpu), Ok(()));
        assert_eq!(good.prepared_unit_count(), 3);
        assert_eq!(NixlBuffer { unit_bytes: 0, ..good }.prepared_unit_count(), 0);
        let huge = NixlBuffer { unit_bytes: 1, ..of_pieces(&[1 << 40]) };
        assert_eq!(huge.prepared_unit_count(), 0);
    }

    #[test]
    fn a_grown_buffer_is_the_same_one_with_more_behind_it() {
        // Broken in production: after a peer has grown, writes go to where its memory never was.
        let of_pieces = |piece_ends: &[u64]| NixlBuffer { piece_ends: piece_ends.to_vec(), ..descriptor() };
        let before = of_pieces(&[600, 900]);
        assert_eq!(before.pieces().collect::<Vec<_>>(), [(0x7000, 600), (0x7000 + 600, 300)]);
        assert_eq!(of_pieces(&[600, 900, 1000]).check_grown_from(&before), Ok(()));
        assert_eq!(before.check_grown_from(&before), Ok(()));
        for piece_ends in [&[600][..], &[600, 901], &[900], &[300, 600, 900], &[1000, 1200, 1500]] {
            assert!(of_pieces(piece_ends).check_grown_from(&before).is_err(), "{piece_ends:?}");
        }
        let moved = NixlBuffer { address: 0x8000, ..of_pieces(&[600, 900, 1000]) };
        assert!(moved.check_grown_from(&before).unwrap_err().contains("0x8000"));
        assert!(NixlBuffer { unit_bytes: 1, ..before.clone() }.check_grown_from(&before).is_err());
        assert_eq!(of_pieces(&[600, 900, 1000]).prepared_unit_count(), 3);
        assert_eq!(of_pieces(&[500, 900]).prepared_unit_count(), 0, "a unit would lie across two pieces");
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
