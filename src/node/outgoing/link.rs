//! Which dialect a receiver speaks. The sockets to it are `runtime::peer_links`.

use super::lmcache::receiver::LmcacheReceiver;

/// What an LMCache receiver is called where others have a name of their own.
pub(super) const LMCACHE_INSTANCE: &str = "LMCache";

/// The dialect of a receiver.
#[derive(Debug)]
pub(super) enum Link {
    /// Ours, as far as is known.
    Pd,
    /// LMCache's.
    Lmcache(Box<LmcacheReceiver>),
}

impl Link {
    /// Whether the receiver takes quiesce acknowledgements, as messages or by a handshake.
    pub(super) const fn takes_quiesce_ack(&self) -> bool {
        matches!(self, Self::Pd)
    }

    /// Whether it is asked something, or about to be.
    pub(super) fn is_busy(&self) -> bool {
        match self {
            Self::Pd => false,
            Self::Lmcache(receiver) => receiver.is_busy(),
        }
    }

    pub(super) const fn lmcache(&self) -> Option<&LmcacheReceiver> {
        match self {
            Self::Pd => None,
            Self::Lmcache(receiver) => Some(receiver),
        }
    }

    pub(super) const fn lmcache_mut(&mut self) -> Option<&mut LmcacheReceiver> {
        match self {
            Self::Pd => None,
            Self::Lmcache(receiver) => Some(receiver),
        }
    }
}
