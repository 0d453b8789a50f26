//! Reads the files that the options name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::error::ConfigError;
use super::notes::Notes;
use super::raw::RawConfig;
use super::resolve::{LayoutSource, Worker, resolve};
use super::secret::read_secret;
use super::{Config, Options, Role};

/// Largest file that is read, in bytes. The largest config.json on model hubs have some hundred KiB.
const FILE_LEN_BYTES_MAX: u64 = 4 << 20;

/// A configuration and what to log about how it came to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// Checked and complete.
    pub config: Config,
    /// Lines for the log: how the buffer was rounded, what was ignored or capped.
    pub notes: Vec<String>,
    /// The same as warnings: who may be let in that is not meant.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads and checks what the options name. `role` is the binary's own: it counts unless `pd_role: both` is written.
    ///
    /// # Errors
    /// [`ConfigError`]: a file that cannot be read, a key or value that cannot be used, a model without a layout. The
    /// daemon then ends with exit code 2.
    pub fn load(role: Role, options: &Options) -> Result<Loaded, ConfigError> {
        let yaml = options.config.as_deref().map(|path| read("the configuration", path)).transpose()?;
        let file = yaml.as_ref().map(|yaml| (yaml.file.as_str(), yaml.text.as_str()));
        let raw = RawConfig::parse(file, &options.set)?;
        let secret = read_secret(&raw)?;

        // clap refuses both together; a caller that builds its own options gets the layout, which says more.
        let layout = match (&options.kv_layout, &options.model) {
            (Some(path), _) => Some((true, read("the layout", path)?)),
            (None, Some(path)) => Some((false, read_model(path)?)),
            (None, None) => None,
        };
        let source = layout.as_ref().map(|(given, text)| match given {
            true => LayoutSource::Given { file: &text.file, text: &text.text },
            false => LayoutSource::Model { file: &text.file, text: &text.text },
        });
        let worker = Worker { rank: options.rank, tp_size: options.tp_size, model_name: options.model_name.as_deref() };
        let (config, Notes { said: notes, warnings }) = resolve(role, &raw, source, worker, secret)?;
        Ok(Loaded { config, notes, warnings })
    }
}

struct Text {
    file: String,
    text: String,
}

/// A model is named by its config.json or by the folder that holds it.
fn read_model(path: &Path) -> Result<Text, ConfigError> {
    if path.is_dir() { read("the model", &path.join("config.json")) } else { read("the model", path) }
}

fn read(what: &'static str, path: &Path) -> Result<Text, ConfigError> {
    let file = path.display().to_string();
    let unreadable = |reason: String| ConfigError::Unreadable { what, file: file.clone(), reason };
    let mut text = String::new();
    File::open(path)
        .and_then(|opened| opened.take(FILE_LEN_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > FILE_LEN_BYTES_MAX {
        return Err(unreadable(format!("it has more than {FILE_LEN_BYTES_MAX} bytes")));
    }
    Ok(Text { file, text })
}
