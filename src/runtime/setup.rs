//! What both daemons need before they can start: memory and engine.

use tokio::sync::mpsc::UnboundedSender;

use super::driver::Inbox;
use super::engine_thread::{EngineThread, Started};
use super::engine_work::EngineEvent;
use super::error::RuntimeError;
use crate::buffer::{CudaDevice, MemoryManager, MemoryOptions, check_cuda_device};
use crate::config::{BufferDevice, Config};
use crate::transfer::nixl::NixlOptions;
use crate::transfer::{EngineKind, EngineOptions};

/// Starts of blocks: short chunks lie behind each other, and copies are fastest from one cache line's start, or
/// two's.
const ALIGNMENT_MAX: u64 = 256;

/// Allocates the pd_buffer where the configuration wants it: all of it, or what a lazy one begins with.
fn allocate(config: &Config) -> Result<MemoryManager, RuntimeError> {
    let initial_bytes = config.buffer_initial_bytes();
    let slot_bytes = config.layout.chunk_bytes();
    let options = MemoryOptions {
        ceiling_bytes: config.buffer_len_bytes(),
        initial_bytes,
        step_bytes: config.buffer_step_bytes(),
        alignment: alignment(slot_bytes),
        slot_bytes,
    };
    match config.buffer.device {
        BufferDevice::Cpu => {
            tracing::info!(bytes = initial_bytes, "filling the pd_buffer with pages");
            Ok(MemoryManager::new(options)?)
        }
        BufferDevice::Cuda(ordinal) => {
            let device = CudaDevice::open(ordinal)?;
            tracing::info!(bytes = initial_bytes, %device, "allocating the pd_buffer");
            Ok(MemoryManager::on_device(device, options)?)
        }
    }
}

/// Says so where this machine has not what the configuration asks of it, in the words of a start.
///
/// # Errors
/// [`RuntimeError::Buffer`], [`RuntimeError::Engine`].
pub(super) fn check_machine(config: &Config) -> Result<(), RuntimeError> {
    if config.engine.kind == Some(EngineKind::Nixl) {
        drop(crate::transfer::start_engine(&engine_options(config, "check"))?);
    }
    match config.buffer.device {
        BufferDevice::Cpu => Ok(()),
        BufferDevice::Cuda(ordinal) => Ok(check_cuda_device(ordinal, config.buffer_len_bytes())?),
    }
}

/// The largest power of two up to [`ALIGNMENT_MAX`] that divides a slot.
const fn alignment(slot_bytes: u64) -> u64 {
    let alignment = 1 << slot_bytes.trailing_zeros();
    if alignment < ALIGNMENT_MAX { alignment } else { ALIGNMENT_MAX }
}

/// The buffer, and the engine that has it registered.
pub(super) struct MemoryAndEngine {
    pub(super) manager: MemoryManager,
    pub(super) engine: EngineThread,
    pub(super) started: Started,
}

/// Allocates the buffer and starts the engine on its thread. Filling gigabytes with pages takes seconds, so a daemon that
/// is told to stop meanwhile does: `None`.
pub(super) async fn start_memory_and_engine<E>(
    config: &Config,
    instance: &str,
    events: &UnboundedSender<E>,
    inbox: &mut Inbox<E>,
) -> Result<Option<MemoryAndEngine>, RuntimeError>
where
    E: From<EngineEvent> + Send + 'static,
{
    let (config, instance, events) = (config.clone(), instance.to_owned(), events.clone());
    let laid = tokio::task::spawn_blocking(move || {
        let manager = allocate(&config)?;
        let (engine, started) = start_engine(&config, &instance, &manager, events)?;
        Ok(MemoryAndEngine { manager, engine, started })
    });
    tokio::select! {
        laid = laid => match laid {
            Ok(laid) => laid.map(Some),
            Err(error) => Err(RuntimeError::Bug(format!("starting the engine: {error}"))),
        },
        () = inbox.told_to_stop() => Ok(None),
    }
}

fn start_engine<E>(
    config: &Config,
    instance: &str,
    manager: &MemoryManager,
    events: UnboundedSender<E>,
) -> Result<(EngineThread, Started), RuntimeError>
where
    E: From<EngineEvent> + Send + 'static,
{
    let options = engine_options(config, instance);
    let started = EngineThread::start(options, manager.clone(), config.layout.chunk_bytes(), events)?;
    tracing::info!("{}", started.1.note);
    Ok(started)
}

fn engine_options(config: &Config, agent_name: &str) -> EngineOptions {
    EngineOptions {
        kind: config.engine.kind,
        nixl: NixlOptions {
            backends: config.engine.nixl_backends.clone(),
            lib_dirs: config.engine.nixl_lib_dir.iter().cloned().collect(),
            progress_delay_us: config.engine.nixl_progress_delay_us,
            agent_name: agent_name.to_owned(),
        },
    }
}
