//! The transfer engines by name.

/// Which transfer engine: the value of `transfer_channel`, and what the handshake compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// NIXL: any host.
    Nixl,
    /// Shared memory: this host alone, needs nothing installed.
    Local,
}

impl EngineKind {
    /// All of them, the preferred one first.
    pub const ALL: [Self; 2] = [Self::Nixl, Self::Local];

    /// The name in configuration and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nixl => "nixl",
            Self::Local => "local",
        }
    }
}

impl std::str::FromStr for EngineKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| format!("{text:?} is no transfer engine; write nixl or local"))
    }
}
