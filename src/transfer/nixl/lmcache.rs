//! LMCache's peers: metadata as NIXL writes it, and pages instead of our descriptors.

use super::NIXL_ENGINE_NAME;
use super::descriptors::NixlBuffer;
use super::engine::NixlEngine;
use super::metadata::check_metadata;
use crate::ids::Pages;
use crate::transfer::{LmcacheEngine, TransferError};

impl LmcacheEngine for NixlEngine {
    fn agent_name_in(&self, metadata: &[u8]) -> Result<String, TransferError> {
        let checked = check_metadata(metadata).map_err(|reason| TransferError::BadExport {
            engine: NIXL_ENGINE_NAME,
            what: "metadata",
            agent: "an LMCache peer".to_owned(),
            reason,
        })?;
        Ok(checked.agent_name.to_owned())
    }

    fn pages(&self, page_bytes: u64) -> Option<Pages> {
        let buffer = self.buffer()?;
        let count = buffer.len_bytes().checked_div(page_bytes).filter(|&count| count > 0)?;
        let &NixlBuffer { address, device, memory_type, .. } = buffer;
        Some(Pages { memory_type, device, address, page_bytes, count })
    }

    fn describe(&self, pages: &Pages) -> Vec<u8> {
        let descriptor = NixlBuffer {
            address: pages.address,
            piece_ends: vec![pages.len_bytes()],
            device: pages.device,
            memory_type: pages.memory_type,
            unit_bytes: pages.page_bytes,
            scratch_address: None,
        };
        descriptor.encode()
    }
}
