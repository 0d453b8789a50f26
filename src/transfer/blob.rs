//! How our engines write metadata and descriptors: a magic word, a version, and one msgpack value.
//!
//! The bytes come from the network, so decoding is bounded before it allocates, and accepts exactly what encoding
//! writes.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest blob that is decoded.
const BLOB_LEN_BYTES_MAX: usize = 4096;

/// Says which kind of blob it is, and in which version.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlobKind {
    /// First bytes of the blob.
    pub(super) magic: &'static [u8],
    /// The byte after them; a change of the value's fields is a new version.
    pub(super) version: u8,
}

impl BlobKind {
    pub(super) fn encode(self, value: &impl Serialize) -> Vec<u8> {
        let mut bytes = [self.magic, &[self.version]].concat();
        rmp_serde::encode::write(&mut bytes, value).expect("plain structs of numbers and text always encode");
        bytes
    }

    /// The value, or what was seen and what was expected.
    pub(super) fn decode<T: Serialize + DeserializeOwned>(self, bytes: &[u8]) -> Result<T, String> {
        if bytes.len() > BLOB_LEN_BYTES_MAX {
            return Err(format!("{} bytes, expected at most {BLOB_LEN_BYTES_MAX}", bytes.len()));
        }
        let (version, body) = bytes
            .strip_prefix(self.magic)
            .and_then(<[u8]>::split_first)
            .ok_or_else(|| format!("it does not start with {:?}", String::from_utf8_lossy(self.magic)))?;
        if *version != self.version {
            return Err(format!("version {version}, expected {}; run the same release on both sides", self.version));
        }
        let value: T = rmp_serde::from_slice(body).map_err(|error| error.to_string())?;
        if self.encode(&value) != bytes {
            return Err(format!("{} bytes that do not say what they mean in the shortest form", bytes.len()));
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND: BlobKind = BlobKind { magic: b"pdtest", version: 3 };

    #[test]
    fn only_what_was_encoded_is_decoded() {
        // Broken in production: a peer of another release is misread and its buffer is written at wrong addresses.
        let value = (7_u64, "name".to_owned());
        let bytes = KIND.encode(&value);
        assert_eq!(KIND.decode::<(u64, String)>(&bytes), Ok(value));
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = bytes.clone();
            change(&mut bytes);
            KIND.decode::<(u64, String)>(&bytes).unwrap_err()
        };
        assert!(with(&|bytes| bytes[0] = b'x').contains("does not start with"));
        assert!(with(&|bytes| bytes[6] = 4).contains("version 4, expected 3"));
        assert!(with(&|bytes| bytes.push(0)).contains("shortest form"));
        assert!(with(&|bytes| bytes.resize(5000, 0)).contains("expected at most"));
        for len in 0..bytes.len() {
            assert!(KIND.decode::<(u64, String)>(&bytes[..len]).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_from_the_network_end_the_process(body in prop::collection::vec(any::<u8>(), 0..64)) {
            // Broken in production: one malformed handshake takes the daemon, and everyone's transfers, down.
            let _ = KIND.decode::<(u64, String)>(&body);
            let _ = KIND.decode::<(u64, String)>(&[&b"pdtest\x03"[..], &body].concat());
        }
    }
}
