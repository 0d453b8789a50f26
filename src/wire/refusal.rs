//! What a sender of LMCache's is answered that cannot be served. It waits for an answer of one type, without a deadline, so it
//! gets one even where its message cannot be read.

use super::decode_error::DecodeError;
use super::limits::{KEYS_MAX, MESSAGE_LEN_BYTES_MAX};
use super::message::{AllocResponse, CacheQueryResponse, InitResponse, MemRegResponse, Message};
use super::scan::{Fields, Head};

/// Most page indexes in a refusal. An LMCache sender that asked for more pages fails on the answer's length instead.
const REFUSED_KEYS_MAX: usize = 4 * KEYS_MAX;

/// The refusal, in LMCache's terms, of a message in its dialect: page index -1 for each key of an allocation, and otherwise an
/// answer with nothing in it. None where nobody waits for an answer, or the message is not in LMCache's dialect.
pub fn refusal(message: &Message) -> Option<Message> {
    let key_count = match message {
        Message::NixlInitRequest(request) if request.pd.is_some() => return None,
        Message::NixlMemRegRequest(request) if request.pd.is_some() => return None,
        Message::AllocRequest(request) if request.pd.is_some() => return None,
        Message::CancelNotif(request) if request.pd.is_some() => return None,
        Message::AllocRequest(request) => request.keys.len(),
        _ => 0,
    };
    of_type(message.type_name(), key_count)
}

/// As [`refusal`], for a payload that cannot be decoded: its type and the number of its keys are read as far as it goes.
pub fn unreadable_refusal(payload: &[u8]) -> Option<Message> {
    if payload.len() > MESSAGE_LEN_BYTES_MAX {
        return None;
    }
    let mut fields = Fields::new(payload).ok()?;
    let (mut type_name, mut key_count) = (None, 0);
    loop {
        match fields.next() {
            Ok(Some((b"type", Head::Text(text)))) => type_name = std::str::from_utf8(text).ok(),
            Ok(Some((b"keys", Head::Array(count)))) => key_count = count,
            // Only a pd-sender has it, and a pd-sender has deadlines.
            Ok(Some((b"pd", Head::Map(_)))) => return None,
            Ok(Some(_)) => {}
            // No list of an allocation is longer than that of its keys, and a key takes a byte at least.
            Err(DecodeError::Limit { what: Fields::ARRAY, count, .. }) if key_count == 0 => {
                key_count = count.min(payload.len());
                break;
            }
            Ok(None) | Err(_) => break,
        }
    }
    of_type(type_name?, key_count)
}

fn of_type(type_name: &str, key_count: usize) -> Option<Message> {
    let remote_indexes = match type_name {
        "AllocRequest" => vec![-1; key_count.clamp(1, REFUSED_KEYS_MAX)],
        _ => Vec::new(),
    };
    Some(match type_name {
        "NixlInitRequest" => Message::NixlInitResponse(InitResponse {
            remote_agent_name: Vec::new(),
            remote_meta_bytes: Vec::new(),
            pd: None,
        }),
        "NixlMemRegRequest" => {
            Message::NixlMemRegResponse(MemRegResponse { remote_xfer_dlist_bytes: Vec::new(), pd: None })
        }
        "AllocRequest" | "CancelNotif" => {
            Message::AllocResponse(AllocResponse { already_sent_indexes: Vec::new(), remote_indexes, pd: None })
        }
        "CacheQueryRequest" => {
            Message::CacheQueryResponse(CacheQueryResponse { cached_keys: Vec::new(), cached_indexes: Vec::new() })
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::super::codec::{decode, encode};
    use super::*;

    /// LMCache's asynchronous allocation, with fields as they should not be.
    #[derive(Serialize)]
    struct Odd<'a> {
        r#type: &'a str,
        req_id: String,
        keys: Vec<String>,
        shape: Vec<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pd: Option<std::collections::BTreeMap<String, u64>>,
    }

    fn odd(type_name: &str, id_len_bytes: usize, keys: usize, key_len_bytes: usize) -> Odd<'_> {
        let keys = vec!["k".repeat(key_len_bytes); keys];
        Odd { r#type: type_name, req_id: "r".repeat(id_len_bytes), keys, shape: vec![2, 1, 4, 2], pd: None }
    }

    #[track_caller]
    fn pages_refused(message: &Odd<'_>) -> usize {
        let payload = encode(message);
        assert!(decode::<Message>(&payload).is_err(), "it cannot be decoded");
        match unreadable_refusal(&payload) {
            Some(Message::AllocResponse(response)) => {
                assert!(response.remote_indexes.iter().all(|&index| index == -1) && response.pd.is_none());
                response.remote_indexes.len()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_unreadable_allocation_is_refused_for_each_of_its_keys() {
        // Broken in production: an LMCache sender waits for ever for the answer to a message beyond our limits.
        assert_eq!(pages_refused(&odd("AllocRequest", 305, 3, 9)), 3);
        assert_eq!(pages_refused(&odd("AllocRequest", 9, 2, 2000)), 2);
        assert_eq!(pages_refused(&odd("AllocRequest", 9, KEYS_MAX + 1, 9)), KEYS_MAX + 1);
        assert_eq!(pages_refused(&odd("AllocRequest", 305, 0, 0)), 1);
        assert_eq!(pages_refused(&odd("AllocRequest", 305, 5 * KEYS_MAX, 1)), REFUSED_KEYS_MAX);
        // Cut off in the middle of its keys, and one that claims more of them than it has.
        let cut = &encode(&odd("AllocRequest", 9, 3, 9))[..60];
        assert!(matches!(unreadable_refusal(cut), Some(Message::AllocResponse(_))));
        let claims = b"\x82\xa4type\xacAllocRequest\xa4keys\xdd\xff\xff\xff\xff\xa1k";
        let Some(Message::AllocResponse(response)) = unreadable_refusal(claims) else { panic!("it is answered") };
        assert!(response.remote_indexes.len() <= claims.len(), "{}", response.remote_indexes.len());
    }

    #[test]
    fn every_unreadable_request_of_lmcaches_is_answered_by_its_type() {
        // Broken in production: as above, for handshakes, cancels and cache queries.
        for (request, answer) in [
            ("NixlInitRequest", "NixlInitResponse"),
            ("NixlMemRegRequest", "NixlMemRegResponse"),
            ("CancelNotif", "AllocResponse"),
            ("CacheQueryRequest", "CacheQueryResponse"),
        ] {
            let refusal = unreadable_refusal(&encode(&odd(request, 305, 2, 2000))).unwrap();
            assert_eq!(refusal.type_name(), answer);
        }
        for request in ["ProxyNotif", "AllocResponse", "PdPing", "Nonsense"] {
            assert_eq!(unreadable_refusal(&encode(&odd(request, 305, 2, 2000))), None, "{request}");
        }
        let ours = Odd { pd: Some([("seq".to_owned(), 1)].into()), ..odd("AllocRequest", 305, 1, 9) };
        assert_eq!(unreadable_refusal(&encode(&ours)), None, "a pd-sender would not know what to make of it");
        for payload in [&b""[..], b"x", b"\x81\xa4type", b"\x80"] {
            assert_eq!(unreadable_refusal(payload), None, "{payload:?}");
        }
    }
}
