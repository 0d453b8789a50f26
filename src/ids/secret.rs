//! The secret that the daemons of one deployment share.

use std::fmt;

/// Fewest bytes of a secret: as many as the hash that it is fed to gives, so that guessing the secret is no easier than
/// guessing a key.
pub const SECRET_LEN_BYTES_MIN: usize = 32;

/// Most bytes of a secret: more is another file by mistake.
pub const SECRET_LEN_BYTES_MAX: usize = 4096;

/// A secret. It is never printed: `Debug` says that there is one, and there is no `Display`.
///
/// Equality is for configurations that are compared with each other. What a peer sends is never compared with it.
#[derive(Clone, PartialEq, Eq)]
pub struct SharedSecret(Vec<u8>);

impl SharedSecret {
    /// A secret of [`SECRET_LEN_BYTES_MIN`] to [`SECRET_LEN_BYTES_MAX`] bytes; white space around it does not count, so
    /// that a final line break in a file does not.
    ///
    /// # Errors
    /// How many bytes it has, when those are too few or too many.
    pub fn new(bytes: &[u8]) -> Result<Self, usize> {
        let trimmed = bytes.trim_ascii();
        if (SECRET_LEN_BYTES_MIN..=SECRET_LEN_BYTES_MAX).contains(&trimmed.len()) {
            Ok(Self(trimmed.to_vec()))
        } else {
            Err(trimmed.len())
        }
    }

    /// For deriving keys, and for nothing else.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_long_enough_and_is_not_printed() {
        // Broken in production: a password of eight letters passes for a secret, or the secret stands in a log.
        assert_eq!(SharedSecret::new(b"hunter22"), Err(8));
        assert_eq!(SharedSecret::new(&[b' '; 100]), Err(0));
        assert_eq!(SharedSecret::new(&[7; SECRET_LEN_BYTES_MAX + 1]), Err(SECRET_LEN_BYTES_MAX + 1));
        let text = "0123456789abcdef0123456789abcdef";
        let secret = SharedSecret::new(format!("  {text}\n").as_bytes()).unwrap();
        assert_eq!(secret, SharedSecret::new(text.as_bytes()).unwrap());
        assert_eq!(secret.expose(), text.as_bytes());
        assert_eq!(format!("{secret:?}"), "SharedSecret(..)");
    }
}
