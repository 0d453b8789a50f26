//! A configuration's text from its first byte to a checked configuration, without files.

use super::raw::RawConfig;
use super::resolve::{LayoutSource, Worker, resolve};
use super::{Config, Role};

const LAYOUT: &str = r#"{"model": "m", "chunk_bytes": 65536}"#;

pub(super) const ROLES: [Role; 3] = [Role::Sender, Role::Receiver, Role::Both];

/// What the text means to a daemon that has this role unless the text says another, and whose chunks have 64 KiB; none where it is refused.
pub(crate) fn read(role: Role, text: &str) -> Option<Config> {
    let raw = RawConfig::parse(Some(("pd.yaml", text)), &[]).ok()?;
    let worker = Worker { rank: 0, tp_size: None, model_name: Some("m") };
    let source = LayoutSource::Given { file: "layout.json", text: LAYOUT };
    resolve(role, &raw, Some(source), worker, None).ok().map(|(config, _)| config)
}

/// What is accepted is accepted as `--check` prints it, and means the same.
pub(crate) fn load(text: &str) {
    for role in ROLES {
        if let Some(config) = read(role, text) {
            let _ = config.to_line();
            let shown = config.to_yaml();
            assert_eq!(
                read(role, &shown).as_ref(),
                Some(&config),
                "what --check prints is another configuration:\n{shown}"
            );
        }
    }
}

/// Whether a daemon of any role would take it.
#[cfg(test)]
pub(crate) fn accepts(text: &str) -> bool {
    ROLES.into_iter().any(|role| read(role, text).is_some())
}
