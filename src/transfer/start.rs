//! Choosing and starting an engine.

use super::local::LocalEngine;
#[cfg(feature = "nixl")]
use super::nixl::NixlEngine;
use super::nixl::NixlOptions;
use super::{EngineKind, TransferEngine, TransferError};

/// What to start.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Which; when left out, NIXL where it works, local otherwise.
    pub kind: Option<EngineKind>,
    /// For NIXL; the agent's name is used by either.
    pub nixl: NixlOptions,
}

/// A running engine.
pub struct StartedEngine {
    /// The engine.
    pub engine: Box<dyn TransferEngine>,
    /// Which it is and why, for the log.
    pub note: String,
}

/// Starts the engine that was asked for, or the best that works here.
///
/// # Errors
/// [`TransferError::Unavailable`] when the one asked for does not work here, or none does.
pub fn start_engine(options: &EngineOptions) -> Result<StartedEngine, TransferError> {
    match options.kind {
        Some(EngineKind::Nixl) => start_nixl(options, "as configured"),
        Some(EngineKind::Local) => start_local(options, "as configured"),
        None => start_nixl(options, "NIXL works here").or_else(|error| start_local(options, &error.to_string())),
    }
}

#[cfg(feature = "nixl")]
fn start_nixl(options: &EngineOptions, why: &str) -> Result<StartedEngine, TransferError> {
    let engine = NixlEngine::start(options.nixl.clone())?;
    let note = format!("transfer engine nixl ({}): {why}", options.nixl.backends.join(", "));
    Ok(StartedEngine { engine: Box::new(engine), note })
}

#[cfg(not(feature = "nixl"))]
fn start_nixl(_options: &EngineOptions, _why: &str) -> Result<StartedEngine, TransferError> {
    Err(super::nixl::not_built())
}

fn start_local(options: &EngineOptions, why: &str) -> Result<StartedEngine, TransferError> {
    let engine = LocalEngine::start(options.nixl.agent_name.clone())?;
    Ok(StartedEngine { engine: Box::new(engine), note: format!("transfer engine local: {why}") })
}

impl std::fmt::Debug for StartedEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StartedEngine").field("engine", &self.engine.name()).field("note", &self.note).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_choice_there_is_an_engine_and_a_reason() {
        // Broken in production: a machine without NIXL does not start at all, or an operator cannot tell why it is slow.
        let options = |kind| EngineOptions { kind, nixl: NixlOptions::new(format!("start-{}", std::process::id())) };
        let chosen = start_engine(&options(Some(EngineKind::Local))).unwrap();
        assert_eq!(chosen.engine.name(), "local");
        assert!(chosen.note.contains("as configured"), "{}", chosen.note);
        let best = start_engine(&options(None)).unwrap();
        assert!(best.note.contains(best.engine.name()), "{}", best.note);
        match (best.engine.name(), start_engine(&options(Some(EngineKind::Nixl)))) {
            ("nixl", other) => assert!(other.is_ok()),
            ("local", Err(error)) => {
                assert!(best.note.contains(&error.to_string()), "{}", best.note)
            }
            (name, _) => panic!("{name} was preferred to NIXL, which works"),
        }
    }
}
