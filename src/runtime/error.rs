//! Why a daemon could not start or go on, and what its exit code says about it.

use crate::buffer::BufferError;
use crate::side_channel::SideChannelError;
use crate::transfer::TransferError;

/// A daemon's end that was not asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The machine lacks something: exit code 3.
    #[error("{0}")]
    Machine(String),
    /// The pd_buffer cannot be had: exit code 3.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// The transfer engine cannot run here: exit code 3.
    #[error(transparent)]
    Engine(#[from] TransferError),
    /// A port or socket cannot be had: exit code 3.
    #[error(transparent)]
    Socket(#[from] SideChannelError),
    /// Our own mistake: exit code 1.
    #[error("{0}; this is a bug of pd-backend")]
    Bug(String),
}

impl RuntimeError {
    /// 3 for the machine, 1 for the rest. Configuration errors never get this far.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Machine(_) | Self::Buffer(_) | Self::Engine(_) | Self::Socket(_) => 3,
            Self::Bug(_) => 1,
        }
    }
}
