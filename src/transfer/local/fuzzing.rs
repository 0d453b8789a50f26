//! What a peer on the same host says of its process and its memory, before anything is opened.

use super::descriptor::{HostDescriptor, LocalBuffer};
use super::identity::Identity;
use crate::buffer::{CudaHandle, HostHandle};
use crate::ids::{DeviceId, IpcHandle};

pub(crate) fn blob(bytes: &[u8]) {
    if let Ok(identity) = Identity::decode(bytes) {
        assert_eq!(identity.encode(), bytes, "two ways to say one thing");
        identity.check_peer(&identity).expect("a process can map its own memory");
    }
    if let Ok(descriptor) = LocalBuffer::decode(bytes) {
        assert_eq!(descriptor.encode(), bytes, "two ways to say one thing");
        let there_bytes = match descriptor {
            LocalBuffer::Host(HostDescriptor { handle, .. }) => handle.len_bytes,
            LocalBuffer::Cuda(handle) => handle.allocation_bytes - handle.offset_bytes,
        };
        assert!(descriptor.len_bytes() <= there_bytes, "more is to be written than there is");
    }
}

pub(crate) fn blob_seeds() -> Vec<Vec<u8>> {
    let identity = Identity::of_this_process("receiver-1".to_owned()).expect("this is Linux");
    let handle = HostHandle { pid: 77, fd: 9, inode: 4711, len_bytes: 1 << 30 };
    let cuda = CudaHandle {
        pid: 77,
        device: DeviceId([7; 16]),
        ordinal: 1,
        ipc: IpcHandle([9; 64]),
        offset_bytes: 512,
        allocation_bytes: 1 << 30,
        len_bytes: 1 << 20,
    };
    let host = LocalBuffer::Host(HostDescriptor { handle, len_bytes: 1 << 20 });
    vec![identity.encode(), host.encode(), LocalBuffer::Cuda(cuda).encode()]
}

#[cfg(test)]
pub(crate) fn accepts(bytes: &[u8]) -> bool {
    Identity::decode(bytes).is_ok() || LocalBuffer::decode(bytes).is_ok()
}
