//! What both daemons need before they can start: memory and engine.

use tokio::sync::mpsc::UnboundedSender;

use super::driver::Inbox;
use super::engine_thread::{EngineEvent, EngineThread, Started};
use super::error::RuntimeError;
use crate::buffer::{MemoryManager, MemoryOptions, cuda_device_count};
use crate::config::{BufferDevice, Config};
use crate::transfer::EngineOptions;
use crate::transfer::nixl::NixlOptions;

/// Starts of blocks: short chunks lie behind each other, and copies are fastest from one cache line's start, or
/// two's.
const ALIGNMENT_MAX: u64 = 256;

/// Allocates the pd_buffer where the configuration wants it: all of it, or what a lazy one begins with.
fn allocate(config: &Config) -> Result<MemoryManager, RuntimeError> {
    match config.buffer.device {
        BufferDevice::Cpu => {
            let initial_bytes = config.buffer_initial_bytes();
            tracing::info!(bytes = initial_bytes, "filling the pd_buffer with pages");
            let slot_bytes = config.layout.chunk_bytes();
            Ok(MemoryManager::new(MemoryOptions {
                ceiling_bytes: config.buffer_len_bytes(),
                initial_bytes,
                step_bytes: config.buffer_step_bytes(),
                alignment: alignment(slot_bytes),
                slot_bytes,
            })?)
        }
        BufferDevice::Cuda(device) => {
            let found = cuda_device_count()?;
            Err(RuntimeError::Machine(format!(
                "pd_buffer_device = cuda:{device}: {found} GPUs are here, but this version keeps its pd_buffer in host memory; \
                 write pd_buffer_device: cpu"
            )))
        }
    }
}

/// The largest power of two up to [`ALIGNMENT_MAX`] that divides a slot.
const fn alignment(slot_bytes: u64) -> u64 {
    let alignment = 1 << slot_bytes.trailing_zeros();
    if alignment < ALIGNMENT_MAX { alignment } else { ALIGNMENT_MAX }
}

/// The buffer, and the engine that has it registered.
pub(super) struct Foundation<P> {
    pub(super) manager: MemoryManager,
    pub(super) engine: EngineThread<P>,
    pub(super) started: Started,
}

/// Allocates the buffer and starts the engine on its thread. Filling gigabytes with pages takes seconds, so a daemon that
/// is told to stop meanwhile does: `None`.
pub(super) async fn lay_foundation<P, E>(
    config: &Config,
    instance: &str,
    news: &UnboundedSender<E>,
    inbox: &mut Inbox<E>,
) -> Result<Option<Foundation<P>>, RuntimeError>
where
    P: Send + 'static,
    E: From<EngineEvent<P>> + Send + 'static,
{
    let (config, instance, news) = (config.clone(), instance.to_owned(), news.clone());
    let laid = tokio::task::spawn_blocking(move || {
        let manager = allocate(&config)?;
        let (engine, started) = start_engine(&config, &instance, &manager, news)?;
        Ok(Foundation { manager, engine, started })
    });
    tokio::select! {
        laid = laid => match laid {
            Ok(laid) => laid.map(Some),
            Err(error) => Err(RuntimeError::Bug(format!("starting the engine: {error}"))),
        },
        () = inbox.told_to_stop() => Ok(None),
    }
}

fn start_engine<P, E>(
    config: &Config,
    instance: &str,
    manager: &MemoryManager,
    events: UnboundedSender<E>,
) -> Result<(EngineThread<P>, Started), RuntimeError>
where
    P: Send + 'static,
    E: From<EngineEvent<P>> + Send + 'static,
{
    let options = EngineOptions {
        kind: config.engine.kind,
        nixl: NixlOptions {
            backends: config.engine.nixl_backends.clone(),
            lib_dirs: config.engine.nixl_lib_dir.iter().cloned().collect(),
            progress_delay_us: config.engine.nixl_progress_delay_us,
            agent_name: instance.to_owned(),
        },
    };
    let started = EngineThread::start(options, manager.clone(), config.layout.chunk_bytes(), events)?;
    tracing::info!("{}", started.1.note);
    Ok(started)
}
