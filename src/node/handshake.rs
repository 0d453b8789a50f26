//! Whether two daemons may talk: versions, engine, and what a chunk is.

use crate::ids::{Failure, FailureKind, METADATA_LEN_BYTES_MAX, PEERS_MAX, Seq, is_printable};
use crate::node::Port;
use crate::wire::Message;
use crate::wire::message::{CAPABILITY_COMMIT, Hello, InitReplyExtension, InitResponse};

/// Refuses a peer that does not mean the same thing by a chunk, naming both values.
///
/// # Errors
/// A refusal that the peer can log as it stands: "ours" in it is the side that refuses.
pub(super) fn check(ours: &Hello, theirs: &Hello) -> Result<(), Failure> {
    check_bounds(theirs)?;
    if theirs.version_min > ours.version_max || theirs.version_max < ours.version_min {
        return Err(Failure::new(
            FailureKind::HandshakeRefused,
            format!(
                "protocol versions {}..={} of {} and {}..={} of {} do not overlap; update the older side",
                theirs.version_min,
                theirs.version_max,
                theirs.instance,
                ours.version_min,
                ours.version_max,
                ours.instance
            ),
        ));
    }
    if theirs.engine != ours.engine {
        return Err(Failure::new(
            FailureKind::HandshakeRefused,
            format!(
                "{} moves bytes with {}, {} with {}; set the same transfer_channel on both sides",
                theirs.instance, theirs.engine, ours.instance, ours.engine
            ),
        ));
    }
    if let Some((name, their_value, our_value)) = first_difference(theirs, ours) {
        return Err(Failure::new(
            FailureKind::LayoutMismatch,
            format!(
                "{name} is {their_value} at {} and {our_value} at {}; start both sides for the same model, dtype, \
                 chunk_size and tensor-parallel size",
                theirs.instance, ours.instance
            ),
        ));
    }
    if !theirs.capabilities.iter().any(|name| name == CAPABILITY_COMMIT) {
        return Err(Failure::new(
            FailureKind::HandshakeRefused,
            format!("{} does not announce the capability {CAPABILITY_COMMIT}; update it", theirs.instance),
        ));
    }
    Ok(())
}

/// Longest name in a handshake, in bytes: of a process, an agent, an engine, a capability, a boot id.
pub(super) const NAME_LEN_BYTES_MAX: usize = 256;
/// Longest name or value of a layout field, in bytes. The names of all groups together are the longest.
const VALUE_LEN_BYTES_MAX: usize = 1024;
/// Most layout fields or capabilities. A layout with as many groups and facts of its serving engine as there may be has 94.
const FIELDS_MAX: usize = 128;

/// Most receivers that a handshake names: as many as can be connected, and as many again that are lost and still written to.
pub(super) const CONNECTED_MAX: usize = 2 * PEERS_MAX as usize;

/// What a sender is answered whose handshake is refused.
pub(super) fn refused(ours: &Hello, seq: Seq, failure: Failure) -> Message {
    let (hello, agent_name) = (ours.clone(), String::new());
    let pd = Some(InitReplyExtension { seq, hello, agent_name, refusal: Some(failure) });
    Message::NixlInitResponse(InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd })
}

/// Why a handshake is refused that came to another port.
pub(super) fn misdirected(port: Port) -> Failure {
    let text = format!(
        "this is the port for {}, not that for handshakes (pd_peer_init_port); correct the ports in the request's \
         receiver, or in pd_receivers",
        port.purpose()
    );
    Failure::new(FailureKind::HandshakeRefused, text)
}

/// Refuses what would be kept for as long as the peer is known, and is longer than anybody needs.
fn check_bounds(theirs: &Hello) -> Result<(), Failure> {
    let boot_id = theirs.process.as_ref().map_or("", |process| process.boot_id.as_str());
    let names = [theirs.instance.as_str(), theirs.engine.as_str(), boot_id];
    let names_fit = names.into_iter().chain(theirs.capabilities.iter().map(String::as_str)).all(name_fits);
    let field_fits = |(name, value): &(String, String)| {
        name.len().max(value.len()) <= VALUE_LEN_BYTES_MAX && is_printable(name) && is_printable(value)
    };
    let fields_fit = theirs.layout.iter().all(field_fits);
    if names_fit && fields_fit && theirs.layout.len().max(theirs.capabilities.len()) <= FIELDS_MAX {
        return Ok(());
    }
    let text = format!(
        "the handshake holds more than {FIELDS_MAX} fields, a name of more than {NAME_LEN_BYTES_MAX} bytes, a layout \
         field of more than {VALUE_LEN_BYTES_MAX}, or control characters; no release of ours sends that"
    );
    Err(Failure::new(FailureKind::Limit, text))
}

/// Refuses an engine's metadata by its length, before anything else is looked at.
///
/// # Errors
/// A refusal that the peer can log as it stands.
pub(super) fn check_metadata(metadata: &[u8]) -> Result<(), Failure> {
    if metadata.len() <= METADATA_LEN_BYTES_MAX {
        return Ok(());
    }
    let text = format!(
        "the handshake holds {} bytes of engine metadata; at most {METADATA_LEN_BYTES_MAX} are read: give the engine fewer backends (nixl_backends), or the buffer fewer pieces (a larger pd_buffer_growth_step)",
        metadata.len()
    );
    Err(Failure::new(FailureKind::Limit, text))
}

/// Whether a name can be kept and written into a log.
pub(super) fn name_fits(name: &str) -> bool {
    name.len() <= NAME_LEN_BYTES_MAX && is_printable(name)
}

/// The first layout field on which two sides differ: its name, the left and the right value.
fn first_difference<'a>(left: &'a Hello, right: &'a Hello) -> Option<(&'a str, &'a str, &'a str)> {
    const ABSENT: &str = "not given";
    let value_in = |fields: &'a [(String, String)], name: &str| {
        fields.iter().find(|(other, _)| other == name).map_or(ABSENT, |(_, value)| value.as_str())
    };
    let names = left.layout.iter().chain(&right.layout).map(|(name, _)| name.as_str());
    names
        .map(|name| (name, value_in(&left.layout, name), value_in(&right.layout, name)))
        .find(|(_, left, right)| left != right)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: &str) -> Hello {
        Hello {
            version_min: 1,
            version_max: 1,
            instance: instance.into(),
            engine: "local".into(),
            layout: vec![("model".into(), "m".into()), ("dtype".into(), "bfloat16".into())],
            capabilities: vec![CAPABILITY_COMMIT.into()],
            process: None,
            rendezvous: None,
        }
    }

    #[test]
    fn a_mismatch_names_the_field_and_both_values() {
        // Broken in production: two engines with different layouts exchange bytes that neither can read.
        let ours = hello("receiver-1");
        assert_eq!(check(&ours, &hello("sender-1")), Ok(()));
        let mut theirs = hello("sender-1");
        theirs.layout[1].1 = "float16".into();
        let failure = check(&ours, &theirs).unwrap_err();
        assert_eq!(failure.kind, FailureKind::LayoutMismatch);
        assert!(failure.text.starts_with("dtype is float16 at sender-1 and bfloat16 at receiver-1"), "{failure}");
        let mut theirs = hello("sender-1");
        theirs.layout.pop();
        assert!(check(&ours, &theirs).unwrap_err().text.starts_with("dtype is not given at sender-1"));
        let mut theirs = hello("sender-1");
        theirs.version_min = 2;
        theirs.version_max = 3;
        assert!(check(&ours, &theirs).unwrap_err().text.contains("2..=3 of sender-1 and 1..=1 of receiver-1"));
        // What stands in the refusal cannot forge a log line.
        for odd in ["m\nERROR forged", "m\u{1b}[2K", "m\u{202e}"] {
            for (at, text) in [("name", odd), ("value", odd)] {
                let mut theirs = hello("sender-1");
                let field = &mut theirs.layout[0];
                *(if at == "name" { &mut field.0 } else { &mut field.1 }) = text.into();
                let failure = check(&ours, &theirs).unwrap_err();
                assert!(failure.kind == FailureKind::Limit && is_printable(&failure.text), "{failure:?}");
            }
        }
        let mut theirs = hello("sender-1");
        theirs.engine = "nixl".into();
        assert!(check(&ours, &theirs).unwrap_err().text.contains("set the same transfer_channel"));
    }
}
