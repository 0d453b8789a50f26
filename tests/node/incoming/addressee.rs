//! Ports that belong to two receivers.

use pd_backend::ids::{FailureKind, Seq};
use pd_backend::node::Port;
use pd_backend::wire::Message;
use pd_backend::wire::message::{AllocResponse, Ping};

use super::bench::*;

#[test]
fn what_is_meant_for_another_receiver_is_refused() {
    // Broken in production: two ports of a router's list are exchanged; what one receiver grants is written into the other's
    // memory, over chunks that are being read there, and is reported as sent.
    let mut bench = Bench::new(4);
    bench.addressee = "another".into();
    let (_, said) = bench.alloc("a", "r", &["k0"]);
    let [(_, AllocResponse { pd: Some(answer), .. })] = said.as_slice() else { panic!("{said:?}") };
    let refusal = answer.refusal.as_ref().unwrap();
    assert_eq!((answer.grant, refusal.kind), (None, FailureKind::BadRequest));
    assert!(refusal.text.contains("that of receiver, and the sender's handshake was with another"), "{refusal}");
    assert_eq!(bench.counts().requests_active, 0);
    assert_eq!(ping(&mut bench, "a"), Some(FailureKind::BadRequest));
    // A sender that is not known here connects again: this receiver may have taken another's place.
    assert_eq!(ping(&mut bench, "c"), Some(FailureKind::HandshakeRefused));
    // Of a sender from before this was said, and of one that means this receiver.
    for addressee in ["", "receiver"] {
        bench.addressee = addressee.into();
        assert_eq!(ping(&mut bench, "a"), None);
    }
    grant_of(&bench.alloc("a", "r", &["k0"]).1);
}

#[test]
fn a_port_says_what_it_is_for() {
    // Broken in production: a sender takes a port for that of allocations, is told nothing, and is connected for as long as
    // the receiver may be silent, again and again.
    let mut bench = Bench::new(4);
    for port in [Port::Init, Port::Query] {
        let ping = Ping { seq: Seq(7), instance: "a".into(), ended: Vec::new(), receiver: "receiver".into() };
        let said = bench.say(port, "a", Message::PdPing(ping));
        let [(_, Message::PdPong(pong))] = said.as_slice() else { panic!("{said:?}") };
        let refusal = pong.refusal.as_ref().unwrap();
        assert_eq!((pong.seq, refusal.kind), (Seq(7), FailureKind::BadRequest));
        assert!(refusal.text.contains("not that for allocations (pd_peer_alloc_port)"), "{refusal}");
    }
    for port in [Port::Alloc, Port::Query] {
        let said = init_message(&mut bench, port, "c", 9);
        let [(_, Message::NixlInitResponse(response))] = said.as_slice() else { panic!("{said:?}") };
        let refusal = response.pd.as_ref().and_then(|pd| pd.refusal.as_ref()).unwrap();
        assert!(refusal.text.contains("not that for handshakes (pd_peer_init_port)"), "{refusal}");
    }
}
