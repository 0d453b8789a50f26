//! Two processes that move bytes: what the engine tests and the transfer bench share.

pub mod gpu;
pub mod hex;
pub mod memory;
pub mod receiver;
pub mod sender;
pub mod skip;

use std::path::PathBuf;

use pd_backend::transfer::nixl::{NixlOptions, load_library};
use pd_backend::transfer::{EngineKind, EngineOptions, TransferEngine, start_engine};

/// Where the tests look for NIXL besides `NIXL_LIB_DIR`: the folder that the project's own set-up fills.
pub fn nixl_lib_dirs() -> Vec<PathBuf> {
    vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".deps/nixl")]
}

/// Whether NIXL can be tested here; says how to get it when it cannot.
///
/// # Panics
/// When `PD_REQUIRE_NIXL=1` and it cannot.
pub fn nixl_is_here() -> bool {
    let Err(error) = load_library(&nixl_lib_dirs()) else {
        return true;
    };
    assert!(std::env::var("PD_REQUIRE_NIXL").as_deref() != Ok("1"), "PD_REQUIRE_NIXL=1, but {error}");
    skip::skip(&format!("no NIXL: {error}; `make test` fetches it, and PD_REQUIRE_NIXL=1 makes this a failure"));
    false
}

/// An engine whose agent's name no other process has.
pub fn engine(kind: EngineKind, role: &str) -> Box<dyn TransferEngine> {
    let agent_name = format!("{role}-{}-{}", std::process::id(), uuid::Uuid::new_v4());
    let nixl = NixlOptions { lib_dirs: nixl_lib_dirs(), ..NixlOptions::new(agent_name) };
    start_engine(&EngineOptions { kind: Some(kind), nixl }).expect("the engine works on this machine").engine
}

/// The engine of that name.
pub fn kind_named(name: &str) -> EngineKind {
    EngineKind::ALL.into_iter().find(|kind| kind.as_str() == name).expect("an engine of that name exists")
}

/// What UCX must find in the environment of a test's process.
pub const ENVIRONMENT: [(&str, &str); 2] = [("UCX_LOG_FILE", "stderr"), ("UCX_NET_DEVICES", "lo")];
