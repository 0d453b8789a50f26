//! A walk over raw msgpack that allocates nothing: every length it announces is held against the bytes that are there
//! and against [`limits`](super::limits) before anybody reserves memory for it.

use super::decode_error::DecodeError;
use super::limits::{DEPTH_MAX, FIELDS_MAX, KEYS_MAX, VALUES_MAX};

/// One value's beginning: what follows it in the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head<'a> {
    /// Nil, a boolean or a float.
    Scalar,
    /// A number that is not negative.
    Unsigned(u64),
    /// A negative number.
    Negative,
    /// Text, not yet checked to be UTF-8.
    Text(&'a [u8]),
    /// Bytes.
    Bytes,
    /// This many values follow.
    Array(usize),
    /// This many pairs of values follow.
    Map(usize),
}

/// Reads values from the front of a payload.
pub(super) struct Scanner<'a> {
    rest: &'a [u8],
    len_bytes: usize,
    value_count: usize,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload, len_bytes: payload.len(), value_count: 0 }
    }

    /// Reads one value's beginning and, for text and bytes, their content.
    pub(super) fn head(&mut self) -> Result<Head<'a>, DecodeError> {
        self.value_count += 1;
        if self.value_count > VALUES_MAX {
            return Err(DecodeError::Limit { what: "values", count: self.value_count, count_max: VALUES_MAX });
        }
        let marker = self.take(1)?[0];
        Ok(match marker {
            0x00..=0x7f => Head::Unsigned(marker.into()),
            0x80..=0x8f => self.map(usize::from(marker & 0x0f))?,
            0x90..=0x9f => self.array(usize::from(marker & 0x0f))?,
            0xa0..=0xbf => Head::Text(self.take(usize::from(marker & 0x1f))?),
            0xc0 | 0xc2 | 0xc3 => Head::Scalar,
            0xc4..=0xc6 => {
                let len_bytes = self.len(marker - 0xc4)?;
                self.take(len_bytes)?;
                Head::Bytes
            }
            0xca => self.skip(4, Head::Scalar)?,
            0xcb => self.skip(8, Head::Scalar)?,
            0xcc..=0xcf => Head::Unsigned(self.number(1 << (marker - 0xcc))?),
            0xd0..=0xd3 => {
                let width = 1 << (marker - 0xd0);
                let bits = self.number(width)?;
                if bits >> (8 * width - 1) == 0 { Head::Unsigned(bits) } else { Head::Negative }
            }
            0xd9..=0xdb => {
                let len_bytes = self.len(marker - 0xd9)?;
                Head::Text(self.take(len_bytes)?)
            }
            0xdc | 0xdd => {
                let count = self.len(marker - 0xdc + 1)?;
                self.array(count)?
            }
            0xde | 0xdf => {
                let count = self.len(marker - 0xde + 1)?;
                self.map(count)?
            }
            0xe0..=0xff => Head::Negative,
            0xc1 | 0xc7..=0xc9 | 0xd4..=0xd8 => {
                return Err(DecodeError::Malformed { offset_bytes: self.offset_bytes() - 1, marker });
            }
        })
    }

    /// Skips a whole value whose own nesting is at most `depth_left`.
    pub(super) fn value(&mut self, depth_left: usize) -> Result<Head<'a>, DecodeError> {
        let head = self.head()?;
        let count = match head {
            Head::Array(count) => count,
            Head::Map(count) => 2 * count,
            _ => return Ok(head),
        };
        let Some(depth_left) = depth_left.checked_sub(1) else {
            return Err(DecodeError::Limit { what: "levels of nesting", count: DEPTH_MAX + 1, count_max: DEPTH_MAX });
        };
        for _ in 0..count {
            self.value(depth_left)?;
        }
        Ok(head)
    }

    /// Values that have been read.
    pub(super) fn value_count(&self) -> usize {
        self.value_count
    }

    /// Bytes that have not been read.
    pub(super) fn rest_len_bytes(&self) -> usize {
        self.rest.len()
    }

    fn offset_bytes(&self) -> usize {
        self.len_bytes - self.rest.len()
    }

    fn take(&mut self, len_bytes: usize) -> Result<&'a [u8], DecodeError> {
        let (front, rest) = self.rest.split_at_checked(len_bytes).ok_or(DecodeError::Truncated {
            offset_bytes: self.offset_bytes(),
            wanted_bytes: len_bytes,
            left_bytes: self.rest.len(),
        })?;
        self.rest = rest;
        Ok(front)
    }

    fn skip(&mut self, len_bytes: usize, head: Head<'a>) -> Result<Head<'a>, DecodeError> {
        self.take(len_bytes).map(|_| head)
    }

    fn number(&mut self, width: usize) -> Result<u64, DecodeError> {
        Ok(self.take(width)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// A length of 1, 2 or 4 bytes.
    fn len(&mut self, log2_width: u8) -> Result<usize, DecodeError> {
        let number = self.number(1 << log2_width)?;
        Ok(usize::try_from(number).expect("at most 32 bits, and this crate runs on 64-bit machines"))
    }

    fn array(&self, count: usize) -> Result<Head<'a>, DecodeError> {
        self.container(Fields::ARRAY, count, KEYS_MAX, count)?;
        Ok(Head::Array(count))
    }

    fn map(&self, count: usize) -> Result<Head<'a>, DecodeError> {
        self.container("fields of a map", count, FIELDS_MAX, count.saturating_mul(2))?;
        Ok(Head::Map(count))
    }

    /// Every value takes a byte at least, so a count beyond the bytes left is a lie.
    fn container(
        &self,
        what: &'static str,
        count: usize,
        count_max: usize,
        wanted_bytes: usize,
    ) -> Result<(), DecodeError> {
        if count > count_max {
            return Err(DecodeError::Limit { what, count, count_max });
        }
        if wanted_bytes > self.rest.len() {
            return Err(DecodeError::Truncated {
                offset_bytes: self.offset_bytes(),
                wanted_bytes,
                left_bytes: self.rest.len(),
            });
        }
        Ok(())
    }
}

/// The fields of the message's own map, one after the other.
pub(super) struct Fields<'a> {
    scanner: Scanner<'a>,
    left: usize,
}

impl Fields<'_> {
    /// What a list is too long in.
    pub(super) const ARRAY: &'static str = "entries of an array";
}

impl<'a> Fields<'a> {
    /// # Errors
    /// When the payload is not a map.
    pub(super) fn new(payload: &'a [u8]) -> Result<Self, DecodeError> {
        let mut scanner = Scanner::new(payload);
        match scanner.head()? {
            Head::Map(count) => Ok(Self { scanner, left: count }),
            _ => Err(DecodeError::NotAMap { first_byte: payload[0] }),
        }
    }

    /// The next field's name, if it is text, and its value's beginning; the value itself is skipped.
    pub(super) fn next(&mut self) -> Result<Option<(&'a [u8], Head<'a>)>, DecodeError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        let name = match self.scanner.value(DEPTH_MAX - 1)? {
            Head::Text(name) => name,
            _ => &[],
        };
        Ok(Some((name, self.scanner.value(DEPTH_MAX - 1)?)))
    }

    pub(super) fn value_count(&self) -> usize {
        self.scanner.value_count()
    }

    pub(super) fn rest_len_bytes(&self) -> usize {
        self.scanner.rest_len_bytes()
    }
}
