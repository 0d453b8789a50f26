//! Which of LMCache's two PD backends has written an answer. They take different messages, and nothing in the handshake
//! tells them apart.

use super::scan::Fields;

/// A value of LMCache's `pd_backend_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LmcacheMode {
    /// `PDBackend`: REQ and REP. What it does not expect disables its socket for good.
    Sync,
    /// `PDBackendAsync`: DEALER and ROUTER. It can be told of a cancelled request.
    Async,
}

/// The mode of whoever wrote this `AllocResponse`: each writes its fields in the order in which it declares them (observed
/// on LMCache 0.5.6). None when that is neither order.
pub fn lmcache_mode(alloc_response: &[u8]) -> Option<LmcacheMode> {
    let mut fields = Fields::new(alloc_response).ok()?;
    let mut names = [&b""[..]; 3];
    for name in &mut names {
        *name = fields.next().ok()??.0;
    }
    match names {
        [b"type", b"already_sent_indexes", b"remote_indexes"] => Some(LmcacheMode::Sync),
        [b"type", b"remote_indexes", b"already_sent_indexes"] => Some(LmcacheMode::Async),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! recorded {
        ($($name:literal),*) => { [$(&include_bytes!(concat!("../../tests/fixtures/lmcache-wire/", $name))[..]),*] };
    }

    #[test]
    fn each_mode_is_known_by_what_it_wrote() {
        // Broken in production: a synchronous receiver is told of a cancel, and serves nobody until it is restarted.
        for recorded in recorded!["sync_alloc_AllocResponse.bin", "sync_alloc_AllocResponse_1.bin"] {
            assert_eq!(lmcache_mode(recorded), Some(LmcacheMode::Sync));
        }
        for recorded in recorded![
            "async_alloc_AllocResponse.bin",
            "async_alloc_AllocResponse_1.bin",
            "async_alloc_AllocResponse_2.bin",
            "async_alloc_AllocResponse_3.bin"
        ] {
            assert_eq!(lmcache_mode(recorded), Some(LmcacheMode::Async));
            assert_eq!(lmcache_mode(&recorded[..recorded.len() - 2]), None);
        }
        let [other] = recorded!["async_alloc_CancelNotif.bin"];
        assert_eq!(lmcache_mode(other), None);
        assert_eq!(lmcache_mode(&[]), None);
    }
}
