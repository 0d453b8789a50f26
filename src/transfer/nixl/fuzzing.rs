//! What a peer's agent says of itself and of its memory, looked over before NIXL or an address calculation sees it.

use super::descriptors::{MEMORY_TYPE_HOST, NixlBuffer};
use super::metadata::{check_metadata, sample_metadata};

pub(crate) fn metadata(bytes: &[u8]) {
    if let Ok(metadata) = check_metadata(bytes) {
        assert!(!metadata.agent_name.is_empty() && metadata.agent_name.len() <= bytes.len());
        metadata.check_grown_from(&metadata).expect("whatever is accepted once is accepted again");
    }
}

pub(crate) fn metadata_seeds() -> Vec<Vec<u8>> {
    vec![sample_metadata(b"an address of UCX", &[1, 2, 9]), sample_metadata(b"c", &[])]
}

pub(crate) fn descriptors(bytes: &[u8]) {
    let Ok(descriptor) = NixlBuffer::decode(bytes) else { return };
    assert_eq!(descriptor.encode(), bytes, "two ways to say one thing");
    descriptor.check_grown_from(&descriptor).expect("whatever is accepted once is accepted again");
    let mut next = descriptor.address;
    for (address, len_bytes) in descriptor.pieces() {
        assert_eq!(address, next, "pieces lie side by side");
        next = address.checked_add(len_bytes).expect("no piece ends beyond the last address");
    }
    assert_eq!(next - descriptor.address, descriptor.len_bytes());
}

pub(crate) fn descriptor_seeds() -> Vec<Vec<u8>> {
    let one = NixlBuffer {
        address: 0x7000_0000,
        piece_ends: vec![1 << 20],
        device: 0,
        memory_type: MEMORY_TYPE_HOST,
        unit_bytes: 4096,
        scratch_address: Some(0x9000_0000),
    };
    let three = NixlBuffer { piece_ends: vec![1 << 20, 3 << 20, 1 << 40], ..one.clone() };
    vec![one.encode(), three.encode()]
}

#[cfg(test)]
pub(crate) fn accepts_metadata(bytes: &[u8]) -> bool {
    check_metadata(bytes).is_ok()
}

#[cfg(test)]
pub(crate) fn accepts_descriptors(bytes: &[u8]) -> bool {
    NixlBuffer::decode(bytes).is_ok()
}
