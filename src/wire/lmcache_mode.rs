//! Which of LMCache's two PD backends a receiver runs.

/// A value of LMCache's `pd_backend_mode`. Nothing in its messages says it. The socket does with which a receiver listens for
/// allocations: REP in the synchronous mode, ROUTER in the asynchronous one (observed on LMCache 0.5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LmcacheMode {
    /// `PDBackend`: REQ and REP. A message that it does not expect disables its socket for good.
    Sync,
    /// `PDBackendAsync`: DEALER and ROUTER. It can be told of a cancelled request.
    Async,
}
