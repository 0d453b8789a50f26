//! What LMCache's peers need of an engine. They exchange NIXL's metadata and pages, and nothing of ours.

use super::TransferError;
use crate::ids::Pages;

/// An engine that LMCache's peers can reach.
pub trait LmcacheEngine {
    /// Whose metadata this is: LMCache's messages do not say.
    ///
    /// # Errors
    /// [`TransferError::BadExport`] when the bytes are not what this engine writes.
    fn agent_name_in(&self, metadata: &[u8]) -> Result<String, TransferError>;

    /// The registered memory as pages of `page_bytes`, the rest left out; none where not one fits.
    fn pages(&self, page_bytes: u64) -> Option<Pages>;

    /// The descriptors, for [`connect`](super::TransferEngine::connect), of a peer that has said where its pages are.
    fn describe(&self, pages: &Pages) -> Vec<u8>;
}
