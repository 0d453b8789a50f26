//! The engine `nixl`: NVIDIA's transfer library, over whatever its backends find between two hosts (UCX: shared
//! memory, RDMA, TCP).
//!
//! `nixl_sys` is named in this folder alone. Its wrappers are not trusted with what they leave to the caller: the
//! library is looked for and checked before the first call (a missing one, or a missing symbol, would abort the
//! process), memory and registration have one owner, prepared lists die before their agent, and no peer is
//! forgotten while a request to it is in progress (NIXL would free that request twice).
//!
//! Without the cargo feature `nixl` (no libclang to build its bindings with) only the options are here, and the engine is
//! unavailable.

#[cfg(not(feature = "nixl"))]
mod absent;
#[cfg(feature = "nixl")]
mod agent;
#[cfg(any(feature = "nixl", test))]
#[cfg_attr(not(feature = "nixl"), allow(dead_code))]
mod agents;
#[cfg(any(feature = "nixl", test, feature = "fuzzing"))]
#[cfg_attr(not(feature = "nixl"), allow(dead_code))]
mod descriptors;
#[cfg(feature = "nixl")]
mod engine;
mod environment;
#[cfg(feature = "nixl")]
mod errors;
#[cfg(feature = "nixl")]
mod flights;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(feature = "nixl")]
mod library;
#[cfg(all(feature = "nixl", feature = "lmcache"))]
mod lmcache;
#[cfg(any(feature = "nixl", test, feature = "fuzzing"))]
#[cfg_attr(not(feature = "nixl"), allow(dead_code))]
mod metadata;
#[cfg(feature = "nixl")]
mod peers;

use std::path::PathBuf;

use crate::ids::EngineKind;

#[cfg(not(feature = "nixl"))]
pub use absent::load_library;
#[cfg(not(feature = "nixl"))]
pub(super) use absent::not_built;
#[cfg(feature = "nixl")]
pub use engine::NixlEngine;
pub use environment::prepare_environment;
#[cfg(feature = "nixl")]
pub use library::{NIXL_LIBRARY_NAME, load_library};

/// The engine's name in configuration and on the wire.
pub const NIXL_ENGINE_NAME: &str = EngineKind::Nixl.as_str();

/// How to start the engine.
#[derive(Debug, Clone)]
pub struct NixlOptions {
    /// NIXL's backends, in order of preference.
    pub backends: Vec<String>,
    /// Folders to look for the library in, before `NIXL_LIB_DIR` and what the system searches.
    pub lib_dirs: Vec<PathBuf>,
    /// How long NIXL's progress thread waits for events between two looks of its own, in microseconds. 0 burns a whole
    /// core, 1000 some percent of one, 10000 nothing that can be measured.
    pub progress_delay_us: u64,
    /// The agent's name: one that no other process has or had.
    pub agent_name: String,
}

impl NixlOptions {
    /// UCX, found where the system finds it, for an agent of that name.
    pub fn new(agent_name: impl Into<String>) -> Self {
        Self {
            backends: vec!["UCX".to_owned()],
            lib_dirs: Vec::new(),
            progress_delay_us: 10_000,
            agent_name: agent_name.into(),
        }
    }
}
