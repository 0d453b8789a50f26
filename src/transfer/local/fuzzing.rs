//! What a peer on the same host says of its process and its memory, before anything is opened.

use super::identity::Identity;
use super::peer::BufferDescriptor;
use crate::buffer::HostHandle;

pub(crate) fn blob(bytes: &[u8]) {
    if let Ok(identity) = Identity::decode(bytes) {
        assert_eq!(identity.encode(), bytes, "two ways to say one thing");
        identity.check_peer(&identity).expect("a process can map its own memory");
    }
    if let Ok(descriptor) = BufferDescriptor::decode(bytes) {
        assert_eq!(descriptor.encode(), bytes, "two ways to say one thing");
        assert!(descriptor.len_bytes <= descriptor.handle.len_bytes, "more is to be written than there is");
    }
}

pub(crate) fn blob_seeds() -> Vec<Vec<u8>> {
    let identity = Identity::of_this_process("receiver-1".to_owned()).expect("this is Linux");
    let handle = HostHandle { pid: 77, fd: 9, inode: 4711, len_bytes: 1 << 30 };
    vec![identity.encode(), BufferDescriptor { handle, len_bytes: 1 << 20 }.encode()]
}

#[cfg(test)]
pub(crate) fn accepts(bytes: &[u8]) -> bool {
    Identity::decode(bytes).is_ok() || BufferDescriptor::decode(bytes).is_ok()
}
