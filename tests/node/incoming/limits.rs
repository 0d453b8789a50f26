//! What a handshake may cost a receiver whose engine is busy, and what must not be refused.

use pd_backend::ids::{FailureKind, METADATA_LEN_BYTES_MAX, Pages, Seq};
use pd_backend::kv_layout::{
    ENGINE_FACT_LEN_BYTES_MAX, ENGINE_FACTS_MAX, GROUP_NAME_LEN_BYTES_MAX, GROUPS_MAX, KvGroup, KvLayout,
    MODEL_LEN_BYTES_MAX,
};
use pd_backend::node::Output;
use pd_backend::node::Port;
use pd_backend::wire::Message;
use pd_backend::wire::message::{Hello, InitExtension, InitRequest, InitResponse};

use super::bench::*;
use crate::settings::hello;

/// A handshake; of LMCache's without a name.
fn init(name: Option<&str>, metadata_len_bytes: usize, layout: Vec<(String, String)>) -> Message {
    let extension = |name: &str| InitExtension {
        seq: Seq(1000),
        hello: Hello { layout, ..hello(name) },
        agent_name: "agent".into(),
        connected: Vec::new(),
    };
    Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![7; metadata_len_bytes], pd: name.map(extension) })
}

/// What a session whose engine reads nothing says at once, and how many bytes of metadata its engine is to read.
fn busy(bench: &mut Bench, route: &'static str, message: Message) -> (Option<InitResponse>, usize) {
    bench.session.handle_port_message(bench.now, Port::Init, route, message);
    let (mut said, mut loading_bytes) = (None, 0);
    while let Some(output) = bench.session.poll_output() {
        match output {
            Output::Send { message: Message::NixlInitResponse(response), .. } => said = Some(response),
            Output::LoadPeer { metadata, .. } => loading_bytes += metadata.len(),
            _ => {}
        }
    }
    (said, loading_bytes)
}

#[test]
fn metadata_is_refused_by_its_length_before_the_engine_is_asked() {
    // Broken in production: what no engine reads waits for a busy one, in as many copies as there are connections.
    let pages = Pages { memory_type: 0, device: 0, address: 4096, page_bytes: 16, count: 0 };
    let mut bench = Bench::with(4, 4, |settings| settings.pages = Some(pages));
    let layout = || hello("x").layout;
    let (said, loading_bytes) = busy(&mut bench, "c", init(Some("c"), METADATA_LEN_BYTES_MAX + 1, layout()));
    let refusal = said.unwrap().pd.unwrap().refusal.unwrap();
    assert_eq!((refusal.kind, loading_bytes), (FailureKind::Limit, 0));
    assert!(refusal.text.contains("1048577 bytes") && refusal.text.contains("at most 1048576"), "{refusal}");
    let (said, loading_bytes) = busy(&mut bench, "l", init(None, METADATA_LEN_BYTES_MAX + 1, layout()));
    assert!(said.unwrap().remote_meta_bytes.is_empty(), "LMCache's own refusal");
    assert_eq!(loading_bytes, 0);
    let (said, loading_bytes) = busy(&mut bench, "d", init(Some("d"), METADATA_LEN_BYTES_MAX, layout()));
    assert_eq!((said, loading_bytes), (None, METADATA_LEN_BYTES_MAX), "this may be read");
}

#[test]
fn handshakes_that_the_engine_reads_count_as_peers() {
    // Broken in production: while the engine is busy, handshakes pile up without end.
    const NAMES: [&str; 6] = ["s", "t", "u", "v", "w", "x"];
    let pages = Pages { memory_type: 0, device: 0, address: 4096, page_bytes: 16, count: 0 };
    let kinds: &[bool] = if cfg!(feature = "lmcache") { &[true, false] } else { &[true] };
    for &ours in kinds {
        let mut bench = Bench::with(4, 4, |settings| {
            settings.peers_max = 4;
            settings.pages = Some(pages);
        });
        let mut loading = 0;
        let mut refused = 0;
        for name in NAMES {
            let (said, loading_bytes) = busy(&mut bench, name, init(ours.then_some(name), 1, hello("x").layout));
            loading += loading_bytes;
            refused += usize::from(said.is_some());
        }
        // Of ours, the two that are idle make room.
        assert_eq!((loading, refused), (4, 2), "ours: {ours}");
    }
}

#[test]
fn the_largest_layout_that_is_accepted_can_shake_hands() {
    // Broken in production: a hybrid model whose connector compares many facts passes `--check` and never connects.
    let group = |number: usize| KvGroup {
        name: format!("{number:0width$}", width = GROUP_NAME_LEN_BYTES_MAX),
        dtype: "bfloat16".into(),
        dtype_bytes: 2,
        layers: 4,
        kv_heads: 2,
        head_size: 8,
        kv_planes: 2,
        whole: true,
    };
    let fact = |number: usize| format!("{number:0width$}", width = ENGINE_FACT_LEN_BYTES_MAX);
    let layout = KvLayout {
        model: "m".repeat(MODEL_LEN_BYTES_MAX),
        chunk_tokens: 16,
        tp_rank: 0,
        tp_size: 1,
        groups: (0..GROUPS_MAX).map(group).collect(),
        engine: (0..ENGINE_FACTS_MAX).map(|number| (fact(number), fact(number))).collect(),
    };
    layout.check().unwrap();
    let mut bench = Bench::new(4);
    // It is compared with the receiver's, which is another, once nothing of it is too long.
    let (said, _) = busy(&mut bench, "c", init(Some("c"), 1, layout.fingerprint()));
    let refusal = said.unwrap().pd.unwrap().refusal.unwrap();
    assert_eq!(refusal.kind, FailureKind::LayoutMismatch, "{refusal}");
}
