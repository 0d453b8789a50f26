//! How GPUs, and what they share, are named between processes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Names a GPU among all of a host's, whatever the order in which a process sees them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(pub [u8; 16]);

impl fmt::Display for DeviceId {
    /// As `nvidia-smi -L` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for part in [0..4, 4..6, 6..8, 8..10, 10..16] {
            write!(f, "-{}", hex(&self.0[part]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DeviceId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?}, expected a GPU's UUID, GPU- and 32 hexadecimal digits in five groups");
        let digits: String = text.strip_prefix("GPU-").ok_or_else(refuse)?.split('-').collect();
        let uuid = Self(from_hex(&digits).ok_or_else(refuse)?);
        if uuid.to_string() == text { Ok(uuid) } else { Err(refuse()) }
    }
}

impl TryFrom<String> for DeviceId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceId> for String {
    fn from(uuid: DeviceId) -> Self {
        uuid.to_string()
    }
}

/// The driver's name for an allocation, or an event, that other processes may open: 64 bytes that mean something to it
/// alone, written as hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpcHandle(pub [u8; 64]);

impl fmt::Display for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcHandle({self})")
    }
}

impl FromStr for IpcHandle {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("{} characters, expected the 128 lower-case hexadecimal digits of a handle", text.len());
        let handle = Self(from_hex(text).ok_or_else(refuse)?);
        if handle.to_string() == text { Ok(handle) } else { Err(refuse()) }
    }
}

impl TryFrom<String> for IpcHandle {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<IpcHandle> for String {
    fn from(handle: IpcHandle) -> Self {
        handle.to_string()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; N];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_in_no_other_way() {
        // Broken in production: a peer's GPU is taken for another one, or garbage is handed to the driver as a handle.
        let uuid = DeviceId([0x11, 0x22, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0xff]);
        let text = "GPU-11220304-0506-0708-090a-0b0c0d0e0fff";
        assert_eq!((uuid.to_string().as_str(), text.parse()), (text, Ok(uuid)));
        for bad in ["", "GPU-", &text[4..], &text.to_uppercase(), "GPU-112203040506-0708-090a-0b0c0d0e0fff"] {
            assert!(bad.parse::<DeviceId>().is_err(), "{bad}");
        }
        let handle = IpcHandle([0xab; 64]);
        assert_eq!("ab".repeat(64).parse(), Ok(handle));
        for bad in ["ab".repeat(63), "AB".repeat(64), "+a".repeat(64), "ä".repeat(64)] {
            assert!(bad.parse::<IpcHandle>().is_err(), "{bad}");
        }
    }
}
