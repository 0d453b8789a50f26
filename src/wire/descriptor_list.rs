//! Lists of pages as LMCache's PD backend exchanges them: NIXL descriptors, pickled by its Python binding.
//!
//! A pickle is a program, and loading one runs whatever it names. So this is no unpickler: it reads the one program that
//! the binding writes, instruction by instruction, and refuses everything else. Nothing is looked up, called or built.
//!
//! ```text
//! PROTO 4 | "nixl_cu12._bindings" | "nixlXferDList" | STACK_GLOBAL | EMPTY_TUPLE | NEWOBJ | BYTES | BUILD | STOP
//! ```
//!
//! with `MEMOIZE` after most and `FRAME` between some. The bytes are NIXL's own serialisation: `nixlSerDes|`, then records
//! of tag, length (u64), bytes and `|`: `nixlDList` = `nixlBDList`, `t` = memory type (u32), `n` = how many (u64), and
//! without a tag the descriptors, each {address, length, device} as u64, all little-endian. Observed with NIXL 1.5.1
//! (`tests/fixtures/lmcache-wire`).

use crate::ids::Pages;

/// The binding's module under a name that every CUDA flavour of its wheel answers to.
pub const ANY_FLAVOUR: &str = "nixl._bindings";

const CLASS: &str = "nixlXferDList";
const DESCRIPTOR_BYTES: usize = 24;

const PROTO: u8 = 0x80;
const FRAME: u8 = 0x95;
const MEMOIZE: u8 = 0x94;
const SHORT_TEXT: u8 = 0x8c;
const STACK_GLOBAL: u8 = 0x93;
const EMPTY_TUPLE: u8 = b')';
const NEWOBJ: u8 = 0x81;
const SHORT_BYTES: u8 = b'C';
const BYTES: u8 = b'B';
const BUILD: u8 = b'b';
const STOP: u8 = b'.';

/// Why some bytes are not such a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorListError {
    /// Another pickle, or none.
    #[error(
        "byte {at} of the descriptor list is {seen}, expected {expected}; it is not what NIXL's Python binding writes"
    )]
    Shape {
        /// Where.
        at: usize,
        /// What was there.
        seen: String,
        /// What the binding writes there.
        expected: &'static str,
    },
    /// A class that is not the binding's.
    #[error(
        "the descriptor list is a pickle of {module}.{class}, expected {CLASS} of nixl's bindings; nothing of it was run"
    )]
    Class {
        /// Its module.
        module: String,
        /// Its name.
        class: String,
    },
    /// Pages that are not side by side and of one length.
    #[error("descriptor {index} is {len_bytes} bytes at {address:#x} on device {device}, expected {expected}")]
    Pages {
        /// Which.
        index: u64,
        /// Its length.
        len_bytes: u64,
        /// Its address.
        address: u64,
        /// Its device.
        device: u64,
        /// What would have been a page of the list.
        expected: String,
    },
}

/// Writes a list: equal pages side by side, the only one that LMCache makes. `module` is the peer's, from [`decode`], or [`ANY_FLAVOUR`].
pub fn encode(module: &str, pages: &Pages) -> Vec<u8> {
    let mut list = b"nixlSerDes|".to_vec();
    record(&mut list, b"nixlDList", b"nixlBDList");
    record(&mut list, b"t", &pages.memory_type.to_le_bytes());
    record(&mut list, b"n", &pages.count.to_le_bytes());
    let mut descriptors = Vec::with_capacity(DESCRIPTOR_BYTES * pages.count as usize);
    for page in 0..pages.count {
        for word in [pages.address + page * pages.page_bytes, pages.page_bytes, pages.device] {
            descriptors.extend_from_slice(&word.to_le_bytes());
        }
    }
    record(&mut list, b"", &descriptors);

    let mut body = Vec::with_capacity(list.len() + 64);
    for name in [module, CLASS] {
        body.extend_from_slice(&[SHORT_TEXT, name.len() as u8]);
        body.extend_from_slice(name.as_bytes());
        body.push(MEMOIZE);
    }
    body.extend_from_slice(&[STACK_GLOBAL, MEMOIZE, EMPTY_TUPLE, NEWOBJ, MEMOIZE]);
    match u8::try_from(list.len()) {
        Ok(len) => body.extend_from_slice(&[SHORT_BYTES, len]),
        Err(_) => {
            body.push(BYTES);
            body.extend_from_slice(&(list.len() as u32).to_le_bytes());
        }
    }
    body.extend_from_slice(&list);
    body.extend_from_slice(&[MEMOIZE, BUILD, STOP]);
    let mut pickle = vec![PROTO, 4, FRAME];
    pickle.extend_from_slice(&(body.len() as u64).to_le_bytes());
    pickle.extend_from_slice(&body);
    pickle
}

fn record(out: &mut Vec<u8>, tag: &[u8], bytes: &[u8]) {
    out.extend_from_slice(tag);
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
    out.push(b'|');
}

/// Reads a list: the binding's module, to answer with, and the pages.
///
/// # Errors
/// [`DescriptorListError`] for anything that the binding does not write, and for pages that are not equal and side by side.
/// Nothing is allocated beyond what an error shows.
pub fn decode(pickle: &[u8]) -> Result<(String, Pages), DescriptorListError> {
    let mut program = DescriptorReader { bytes: pickle, at: 0 };
    program.expect(&[PROTO, 4], "PROTO 4")?;
    let module = program.short_text("the name of a module")?;
    let class = program.short_text("the name of a class")?;
    if class != CLASS.as_bytes() || !is_binding(module) {
        return Err(DescriptorListError::Class { module: shown(module), class: shown(class) });
    }
    for (instruction, name) in [(STACK_GLOBAL, "STACK_GLOBAL"), (EMPTY_TUPLE, "EMPTY_TUPLE"), (NEWOBJ, "NEWOBJ")] {
        program.instruction(instruction, name)?;
    }
    let list = program.long_bytes("the list's bytes")?;
    let list_at = program.at - list.len();
    program.instruction(BUILD, "BUILD")?;
    program.instruction(STOP, "STOP")?;
    if program.at != pickle.len() {
        return Err(program.wrong("nothing after STOP"));
    }
    let pages = read_list(list, list_at)?;
    Ok((String::from_utf8_lossy(module).into_owned(), pages))
}

/// `nixl._bindings`, or `nixl_<flavour>._bindings`: a flavour is of small letters and digits.
fn is_binding(module: &[u8]) -> bool {
    let flavour = module.strip_prefix(b"nixl").and_then(|rest| rest.strip_suffix(b"._bindings"));
    match flavour {
        Some([]) => true,
        Some([b'_', flavour @ ..]) => {
            (1..=16).contains(&flavour.len())
                && flavour.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        }
        _ => false,
    }
}

fn read_list(list: &[u8], starts_at: usize) -> Result<Pages, DescriptorListError> {
    let mut reader = DescriptorReader { bytes: list, at: 0 };
    let located = |error| match error {
        DescriptorListError::Shape { at, seen, expected } => {
            DescriptorListError::Shape { at: at + starts_at, seen, expected }
        }
        other => other,
    };
    reader.expect(b"nixlSerDes|", "nixlSerDes|").map_err(located)?;
    reader.record(b"nixlDList", "nixlDList = nixlBDList").map_err(located).and_then(|kind| match kind {
        b"nixlBDList" => Ok(()),
        other => Err(located(DescriptorListError::Shape { at: 0, seen: shown(other), expected: "nixlBDList" })),
    })?;
    let memory_type = reader.record(b"t", "the memory type").and_then(|bytes| reader.number(bytes)).map_err(located)?;
    let count =
        reader.record(b"n", "the number of descriptors").and_then(|bytes| reader.number(bytes)).map_err(located)?;
    let descriptors = reader.record(b"", "the descriptors").map_err(located)?;
    let whole = usize::try_from(count).ok().and_then(|count| count.checked_mul(DESCRIPTOR_BYTES));
    if reader.at != list.len() || count == 0 || whole != Some(descriptors.len()) {
        return Err(located(reader.wrong("as many descriptors as it says, at least one, and nothing after them")));
    }
    let memory_type = memory_type as u32;
    let mut words =
        descriptors.chunks_exact(8).map(|word| word.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)));
    let mut next = || [words.next(), words.next(), words.next()].map(|word| word.unwrap_or(0));
    let [address, page_bytes, device] = next();
    let fits = count.checked_mul(page_bytes).is_some_and(|len| len > 0 && address.checked_add(len).is_some());
    if !fits {
        let expected = format!("{count} pages of at least a byte that end below 2^64");
        return Err(DescriptorListError::Pages { index: 0, len_bytes: page_bytes, address, device, expected });
    }
    for index in 1..count {
        let expected = [address + index * page_bytes, page_bytes, device];
        let seen = next();
        if seen != expected {
            let [address, len_bytes, device] = seen;
            let expected = format!(
                "{} bytes at {:#x} on device {}, behind the page before",
                expected[1], expected[0], expected[2]
            );
            return Err(DescriptorListError::Pages { index, len_bytes, address, device, expected });
        }
    }
    Ok(Pages { memory_type, device, address, page_bytes, count })
}

struct DescriptorReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> DescriptorReader<'a> {
    fn take(&mut self, count: usize, expected: &'static str) -> Result<&'a [u8], DescriptorListError> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else { return Err(self.wrong(expected)) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn expect(&mut self, what: &[u8], expected: &'static str) -> Result<(), DescriptorListError> {
        if self.bytes[self.at..].starts_with(what) {
            self.at += what.len();
            return Ok(());
        }
        Err(self.wrong(expected))
    }

    /// A record of NIXL's serialisation.
    fn record(&mut self, tag: &[u8], expected: &'static str) -> Result<&'a [u8], DescriptorListError> {
        self.expect(tag, expected)?;
        let len = self.take(8, expected)?;
        let len = usize::try_from(self.number(len)?).unwrap_or(usize::MAX);
        let bytes = self.take(len, expected)?;
        self.expect(b"|", "|")?;
        Ok(bytes)
    }

    /// Little-endian, at most eight bytes.
    fn number(&self, bytes: &[u8]) -> Result<u64, DescriptorListError> {
        if bytes.is_empty() || bytes.len() > 8 {
            return Err(self.wrong("a number of one to eight bytes"));
        }
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// Goes to the next instruction, frames and memoizing left out: neither says anything.
    fn skip_to_next(&mut self) {
        loop {
            match self.bytes.get(self.at) {
                Some(&MEMOIZE) => self.at += 1,
                Some(&FRAME) if self.bytes.len() - self.at >= 9 => self.at += 9,
                _ => return,
            }
        }
    }

    fn instruction(&mut self, code: u8, expected: &'static str) -> Result<(), DescriptorListError> {
        self.skip_to_next();
        self.expect(&[code], expected)
    }

    fn short_text(&mut self, expected: &'static str) -> Result<&'a [u8], DescriptorListError> {
        self.instruction(SHORT_TEXT, expected)?;
        let len = usize::from(self.take(1, expected)?[0]);
        self.take(len, expected)
    }

    fn long_bytes(&mut self, expected: &'static str) -> Result<&'a [u8], DescriptorListError> {
        self.skip_to_next();
        let len_bytes = match self.take(1, expected)? {
            [SHORT_BYTES] => 1,
            [BYTES] => 4,
            _ => {
                self.at -= 1;
                return Err(self.wrong(expected));
            }
        };
        let len = self.take(len_bytes, expected)?;
        let len = usize::try_from(self.number(len)?).unwrap_or(usize::MAX);
        self.take(len, expected)
    }

    fn wrong(&self, expected: &'static str) -> DescriptorListError {
        let seen = match self.bytes.get(self.at..).unwrap_or_default() {
            [] => "the end".to_owned(),
            rest => shown(&rest[..rest.len().min(24)]),
        };
        DescriptorListError::Shape { at: self.at, seen, expected }
    }
}

/// Bytes of a peer as they can stand in a log.
fn shown(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(64)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: Pages = Pages { memory_type: 0, device: 0, address: 0x7f0e_9aaf_f000, page_bytes: 8192, count: 8 };

    /// A pickle of `module.class` applied to `list`, as protocol 4 has it.
    fn pickle(module: &str, class: &str, tail: &[u8]) -> Vec<u8> {
        let mut bytes = vec![PROTO, 4];
        for name in [module, class] {
            bytes.extend_from_slice(&[SHORT_TEXT, name.len() as u8]);
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes.extend_from_slice(tail);
        bytes
    }

    #[test]
    fn what_is_written_is_read_for_every_flavour_and_size() {
        // Broken in production: LMCache with another CUDA wheel, or a large buffer, cannot be talked to.
        for module in ["nixl_cu12._bindings", "nixl_cu13._bindings", "nixl_rocm._bindings", ANY_FLAVOUR] {
            for count in [1, 2, 8, 5000] {
                let pages = Pages { count, device: 3, memory_type: 1, ..PAGES };
                assert_eq!(decode(&encode(module, &pages)), Ok((module.to_owned(), pages)));
            }
        }
    }

    #[test]
    fn nothing_but_the_bindings_class_is_accepted() {
        // Broken in production: whoever reaches the init port names a function, and it is called.
        let call = [b"\x93)R.".as_slice(), b"\x93\x8c\x02id\x85R.", b"\x93)\x81b."];
        for (module, class) in [("os", "system"), ("nixl_cu12._bindings", "nixlAgent"), ("posix._bindings", CLASS)] {
            for tail in call {
                let error = decode(&pickle(module, class, tail)).unwrap_err();
                let expected = DescriptorListError::Class { module: module.into(), class: class.into() };
                assert_eq!(error, expected);
            }
        }
        for module in ["nixl_../../x._bindings", "nixl_._bindings", "nixl.os._bindings", "nixl_cu12.evil._bindings"] {
            assert!(matches!(decode(&pickle(module, CLASS, b"")), Err(DescriptorListError::Class { .. })), "{module}");
        }
        // The right class, and then another program: REDUCE where NEWOBJ belongs, a second object, protocol 0.
        let good = encode(ANY_FLAVOUR, &PAGES);
        for (from, to) in [
            (b"\x93\x94)\x81".as_slice(), b"\x93\x94)R".as_slice()),
            (b"b.", b"bcos\nsystem\n."),
            (b"\x80\x04", b"\x80\x00"),
        ] {
            let at = good.windows(from.len()).rposition(|window| window == from).unwrap();
            let bad = [&good[..at], to, &good[at + from.len()..]].concat();
            assert!(matches!(decode(&bad), Err(DescriptorListError::Shape { .. })), "{from:?}");
        }
    }

    #[test]
    fn a_list_that_is_cut_short_or_longer_than_it_says_is_refused() {
        // Broken in production: garbage on the init port ends the daemon, or makes it reserve what the garbage announces.
        let good = encode("nixl_cu12._bindings", &PAGES);
        for end in 0..good.len() {
            assert!(decode(&good[..end]).is_err(), "{end} of {} bytes", good.len());
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            // A frame's length says nothing; everything else does.
            assert!((3..11).contains(&at) || decode(&bad) != decode(&good), "byte {at}");
        }
    }

    #[test]
    fn pages_that_are_not_a_buffer_are_refused_by_name() {
        // Broken in production: a page index means other bytes to the peer than to us.
        let mut gap = encode(ANY_FLAVOUR, &PAGES);
        let at = gap.len() - 4 - 24;
        gap[at] += 1;
        let error = decode(&gap).unwrap_err().to_string();
        assert!(
            error.starts_with("descriptor 7 is 8192 bytes at 0x7f0e9ab0d001 on device 0, expected 8192 bytes at"),
            "{error}"
        );
        for pages in [Pages { count: 0, ..PAGES }, Pages { page_bytes: 0, ..PAGES }] {
            assert!(decode(&encode(ANY_FLAVOUR, &pages)).is_err(), "{pages:?}");
        }
    }

    #[test]
    fn lists_are_those_of_nixls_python_binding() {
        // Broken in production: an LMCache peer cannot load our pages, or we take other bytes for its.
        let recorded = [
            &include_bytes!(
                "../../tests/fixtures/lmcache-wire/sync_init_NixlMemRegRequest.local_xfer_dlist_bytes.pickle"
            )[..],
            include_bytes!(
                "../../tests/fixtures/lmcache-wire/sync_init_NixlMemRegResponse.remote_xfer_dlist_bytes.pickle"
            ),
        ];
        for recorded in recorded {
            let (module, pages) = decode(recorded).unwrap();
            assert_eq!((module.as_str(), pages.memory_type, pages.device), ("nixl_cu12._bindings", 0, 0));
            assert_eq!(encode(&module, &pages), recorded);
        }
    }
}
