//! What both daemons need before they can start: memory and engine.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use super::driver::Inbox;
use super::engine_thread::{EngineEvent, EngineThread, Started};
use super::error::RuntimeError;
use crate::buffer::{HostMemory, Memory, cuda_device_count};
use crate::config::{BufferDevice, Config};
use crate::transfer::EngineOptions;
use crate::transfer::nixl::NixlOptions;

/// Allocates the pd_buffer where the configuration wants it.
fn allocate(config: &Config) -> Result<Memory, RuntimeError> {
    match config.buffer.device {
        BufferDevice::Cpu => {
            tracing::info!(bytes = config.buffer_len_bytes(), "filling the pd_buffer with pages");
            Ok(Memory::Host(HostMemory::allocate(config.buffer_len_bytes())?))
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

/// The buffer, and the engine that has it registered.
pub(super) struct Foundation<P> {
    pub(super) memory: Arc<Memory>,
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
        let memory = Arc::new(allocate(&config)?);
        let (engine, started) = start_engine(&config, &instance, &memory, news)?;
        Ok(Foundation { memory, engine, started })
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
    memory: &Arc<Memory>,
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
    let started = EngineThread::start(options, Arc::clone(memory), config.layout.chunk_bytes(), events)?;
    tracing::info!("{}", started.1.note);
    Ok(started)
}
