//! Senders of another make: what LMCache's backends say, and what they are told.

use std::time::Duration;

use pd_backend::ids::{ChunkKey, ClientId, FailureKind, Pages, RequestId, Seq};
use pd_backend::node::Port;
use pd_backend::node::incoming::{IncomingNote, Lookup};
use pd_backend::node::{self, Answer, Output, To};
use pd_backend::wire::message::{AllocRequest, CacheQueryRequest, CancelNotif, InitRequest, MemRegRequest};
use pd_backend::wire::{Message, descriptor_list};

use super::bench::*;
use super::eviction::{cache, there};

const BUFFER: u64 = 0x10_0000;

fn keys(names: &[&str]) -> Vec<ChunkKey> {
    names.iter().map(|name| ChunkKey::new(name).unwrap()).collect()
}

/// A receiver of `slots` slots with `l` and `m`, senders of another make, shaken hands with.
fn lmcache_bench(slots: u64) -> Bench {
    let mut bench = Bench::with(slots, slots, |settings| {
        incoming(settings).retention = Duration::from_secs(20);
        incoming(settings).linger = Duration::from_secs(2);
        settings.pages = Some(Pages { memory_type: 0, device: 0, address: BUFFER, page_bytes: 16, count: 0 });
    });
    assert_eq!(shake_hands(&mut bench, "l", 16).map(|pages| pages.count), Ok(slots));
    bench
}

/// The receiver's pages, or that it says nothing.
fn shake_hands(bench: &mut Bench, route: &'static str, page_bytes: u64) -> Result<Pages, ()> {
    let init = InitRequest { local_meta_bytes: vec![3], pd: None };
    let said = bench.say(Port::Init, route, Message::NixlInitRequest(init));
    let [(_, Message::NixlInitResponse(response))] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(response.pd, None);
    if response.remote_meta_bytes.is_empty() {
        return Err(());
    }
    let theirs = Pages { memory_type: 0, device: 0, address: 0x9000, page_bytes, count: 3 };
    let register = MemRegRequest {
        remote_agent_name: response.remote_agent_name.clone(),
        local_id: String::new(),
        local_xfer_dlist_bytes: descriptor_list::encode("nixl_cu13._bindings", &theirs),
        pd: None,
    };
    let said = bench.say(Port::Init, route, Message::NixlMemRegRequest(register));
    let [(_, Message::NixlMemRegResponse(response))] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(response.pd, None);
    let (module, pages) = descriptor_list::decode(&response.remote_xfer_dlist_bytes).map_err(|_| ())?;
    assert_eq!((module.as_str(), pages.address), ("nixl_cu13._bindings", BUFFER));
    Ok(pages)
}

struct Ask<'a> {
    names: &'a [&'a str],
    req_id: Option<&'a str>,
    total: Option<u32>,
    last: Option<bool>,
    last_tokens: u64,
    dtype: &'a str,
}

const SYNC: Ask<'_> = Ask { names: &[], req_id: None, total: None, last: None, last_tokens: 4, dtype: "uint8" };

impl Ask<'_> {
    fn message(&self) -> Message {
        let tokens = if self.names.len() == 1 { self.last_tokens } else { 4 };
        Message::AllocRequest(AllocRequest {
            keys: keys(self.names),
            fmt: 1,
            shape: vec![2, 1, tokens, 2],
            dtype: self.dtype.into(),
            last_chunk_toks: self.last_tokens,
            req_id: self.req_id.map(|id| RequestId::new(id).unwrap()),
            is_last_batch: self.last,
            total_chunks: self.total,
            pd: None,
        })
    }
}

/// Positions that need not be sent, and page indexes; none when there is no answer yet.
fn ask(bench: &mut Bench, route: &'static str, ask: &Ask<'_>) -> Option<(Vec<u32>, Vec<i64>)> {
    let said = bench.say(Port::Alloc, route, ask.message());
    answer_to(&said, route)
}

fn answer_to(said: &[(&'static str, Message)], route: &str) -> Option<(Vec<u32>, Vec<i64>)> {
    said.iter().find_map(|(to, message)| match message {
        Message::AllocResponse(response) if *to == route => {
            assert_eq!(response.pd, None, "nothing that it does not know");
            Some((response.already_sent_indexes.clone(), response.remote_indexes.clone()))
        }
        _ => None,
    })
}

/// Lengths of what is found, by key, and which are granted alone.
fn look_up(bench: &mut Bench, names: &[&str], uncommitted: bool) -> (Vec<Option<u64>>, Vec<u32>) {
    let id = bench.next_seq();
    let lookup = Lookup { keys: keys(names), uncommitted, fetches: false };
    bench.session.handle_lookup(bench.now, ClientId(1), id, &lookup);
    match answer_of(bench, id.0) {
        Some(Answer::Found { chunks, granted, .. }) => {
            (chunks.iter().map(|chunk| chunk.as_ref().map(|chunk| chunk.len_bytes)).collect(), granted)
        }
        other => panic!("{other:?}"),
    }
}

fn quarantined(bench: &Bench) -> u32 {
    bench.session.counts().slots.quarantined
}

#[test]
fn granted_chunks_are_not_ready_until_a_reader_takes_them() {
    // Broken in production: a decode worker reads pages that an LMCache sender has not written yet.
    let mut bench = lmcache_bench(4);
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a", "b"], last_tokens: 1, ..SYNC }), Some((vec![], vec![0, 1])));
    assert_eq!(look_up(&mut bench, &["a", "b", "c"], false), (vec![None; 3], vec![0, 1]));
    // Somebody else asks for the same: it is not 'already sent', and a copy of its own could not be told from the first.
    assert_eq!(ask(&mut bench, "m", &Ask { names: &["a"], ..SYNC }), None);
    // Nobody is held up by that.
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["d", "e"], ..SYNC }), Some((vec![], vec![2, 3])));
    let id = bench.next_seq();
    let lookup = Lookup { keys: keys(&["b", "c", "a"]), uncommitted: true, fetches: false };
    bench.session.handle_lookup(bench.now, ClientId(1), id, &lookup);
    let (mut lens, mut answered) = (Vec::new(), None);
    while let Some(output) = bench.session.poll_output() {
        match output {
            Output::Answer { answer: Answer::Found { chunks, .. }, .. } => {
                lens = chunks.iter().map(|chunk| chunk.as_ref().map(|chunk| chunk.len_bytes)).collect();
            }
            Output::Send { to: To::Route(to), message, .. } => answered = answer_to(&[(to, message)], "m"),
            _ => {}
        }
    }
    assert_eq!(lens, [Some(4), None, Some(16)], "a short chunk is short in a whole page");
    assert_eq!(answered, Some((vec![0], vec![])));
    // From now on they are, to everybody.
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a", "b"], last_tokens: 1, ..SYNC }), Some((vec![0, 1], vec![])));
    assert_eq!(look_up(&mut bench, &["a", "b"], false).0, [Some(16), Some(4)]);
}

#[test]
fn of_two_copies_only_the_one_is_read_that_the_proxy_was_told_of() {
    // Broken in production: two prefill workers send the same prefix, the faster one's reader gets the slower one's page.
    let mut bench = lmcache_bench(6);
    let named = |id| Ask { names: &["a"], req_id: Some(id), total: Some(1), last: Some(true), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &named("r")), Some((vec![], vec![0])));
    assert_eq!(ask(&mut bench, "m", &named("s")), Some((vec![], vec![1])));
    assert_eq!(look_up(&mut bench, &["a"], true), (vec![None], vec![0]), "which of them is not known by its key");
    bench.session.handle_wait(bench.now, ClientId(1), Seq(70), RequestId::new("s").unwrap(), None, true);
    let Some(Answer::Ready { chunks, .. }) = answer_of(&mut bench, 70) else { panic!() };
    assert_eq!(chunks[0].offset_bytes, 16);
    bench.session.handle_wait(bench.now, ClientId(1), Seq(71), RequestId::new("r").unwrap(), None, true);
    let Some(Answer::Ready { chunks, .. }) = answer_of(&mut bench, 71) else { panic!() };
    assert_eq!(chunks[0].offset_bytes, 0);
    // A request without a name is found by its keys alone: it waits until no other copy can be meant, or is refused.
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["b"], ..named("t") }), Some((vec![], vec![2])));
    assert_eq!(ask(&mut bench, "m", &Ask { names: &["b"], ..SYNC }), None);
    let said = later(&mut bench, 10);
    assert_eq!(answer_to(&said, "m"), Some((vec![], vec![-1])));
    let twice = ask(&mut bench, "m", &Ask { names: &["c", "c"], ..SYNC });
    assert_eq!(twice, Some((vec![], vec![-1, -1])));
}

#[test]
fn a_request_in_batches_has_its_pages_from_the_first_one_on() {
    // Broken in production: two chunked prefills that fit one by one hold half of the buffer each, and wait for each other.
    let mut bench = lmcache_bench(6);
    let batch = |names, last| Ask { names, req_id: Some("r"), total: Some(4), last: Some(last), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &batch(&["a", "b"], false)), Some((vec![], vec![0, 1])));
    let other = Ask { names: &["x"], req_id: Some("s"), total: Some(3), last: Some(false), ..SYNC };
    assert_eq!(ask(&mut bench, "m", &other), None, "two pages are left, and it needs three");
    assert_eq!(wait(&mut bench, 1, "r", None), None);
    let (already, pages) = ask(&mut bench, "l", &batch(&["c"], false)).unwrap();
    assert_eq!((already, pages.len()), (vec![], 1));
    let too_many = ask(&mut bench, "l", &batch(&["d", "e"], true));
    assert_eq!(too_many, Some((vec![], vec![-1, -1])), "more than it has announced");
    // It ends with fewer chunks than announced: the rest goes to whoever waits.
    let said = {
        let last = ask(&mut bench, "l", &Ask { names: &["d"], last_tokens: 2, ..batch(&[], true) });
        assert_eq!(last.map(|(already, pages)| (already, pages.len())), Some((vec![], 1)));
        bench.session.handle_wait(bench.now, ClientId(2), Seq(9), RequestId::new("r").unwrap(), None, true);
        answer_of(&mut bench, 1)
    };
    // The reader that asked first gets it, the one that vouched learns that it was fetched.
    let Some(Answer::Ready { chunks, .. }) = said else { panic!("{said:?}") };
    assert_eq!(chunks.iter().map(|chunk| chunk.len_bytes).collect::<Vec<_>>(), [16, 16, 16, 8]);
    assert_eq!(chunks.iter().map(|chunk| chunk.key.to_string()).collect::<Vec<_>>(), ["a", "b", "c", "d"]);
}

#[test]
fn an_abandoned_page_is_free_once_its_sender_is_gone_and_not_before() {
    // Broken in production: a write that an LMCache sender has forgotten lands in another request's chunk; or its pages are
    // lost for good.
    let mut bench = lmcache_bench(4);
    let request = Ask { names: &["a", "b"], req_id: Some("r"), total: Some(4), last: Some(false), ..SYNC };
    ask(&mut bench, "l", &request);
    let cancel = CancelNotif { req_id: RequestId::new("r").unwrap(), keys: keys(&["a", "b"]), pd: None };
    // Somebody else's word is none.
    bench.say(Port::Alloc, "m", Message::CancelNotif(cancel.clone()));
    assert_eq!((bench.session.counts().slots.reserved, quarantined(&bench)), (4, 0));
    let said = bench.say(Port::Alloc, "l", Message::CancelNotif(cancel));
    assert_eq!(answer_to(&said, "l"), Some((vec![], vec![])));
    assert_eq!((bench.session.counts().slots.reserved, quarantined(&bench)), (0, 2), "the pages to come are free");
    assert_eq!(look_up(&mut bench, &["a"], true), (vec![None], vec![]), "nobody can vouch for it any more");
    ask(&mut bench, "l", &Ask { names: &["c"], ..SYNC });
    later(&mut bench, 30);
    assert_eq!(quarantined(&bench), 3, "nobody has fetched c either");
    bench.session.handle_route_gone(bench.now, &"l");
    assert_eq!(quarantined(&bench), 3, "what it had posted may still arrive");
    later(&mut bench, 2);
    assert_eq!(quarantined(&bench), 0);
}

#[test]
fn what_was_granted_before_its_sender_left_can_still_be_fetched() {
    // Broken in production: a prefill worker that is restarted takes finished requests with it.
    let mut bench = lmcache_bench(4);
    ask(&mut bench, "l", &Ask { names: &["a"], ..SYNC });
    bench.session.handle_route_gone(bench.now, &"l");
    later(&mut bench, 5);
    assert_eq!(look_up(&mut bench, &["a"], true).0, [Some(16)]);
    ask(&mut bench, "m", &Ask { names: &["b"], ..SYNC });
    bench.session.handle_route_gone(bench.now, &"m");
    later(&mut bench, 19);
    assert_eq!((bench.session.counts().slots.reserved, quarantined(&bench)), (1, 0));
    later(&mut bench, 1);
    assert_eq!(quarantined(&bench), 1);
    later(&mut bench, 2);
    assert_eq!((bench.session.counts().slots.reserved, quarantined(&bench)), (0, 0));
}

#[test]
fn a_no_is_said_in_lmcaches_words_and_leaves_its_sender_alive() {
    // Broken in production: an LMCache sender that does not fit waits for ever, or writes what cannot be read.
    let mut bench = lmcache_bench(2);
    let refused = |count| Some((vec![], vec![-1; count]));
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a", "b", "c"], ..SYNC }), refused(3), "larger than the buffer");
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a"], total: Some(9), ..SYNC }), refused(1));
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a"], last_tokens: 5, ..SYNC }), refused(1), "another shape");
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["a", "b"], ..SYNC }), Some((vec![], vec![0, 1])));
    assert_eq!(ask(&mut bench, "m", &Ask { names: &["c"], ..SYNC }), None, "it waits");
    let said = later(&mut bench, 10);
    assert_eq!(answer_to(&said, "m"), refused(1), "pd_allocation_timeout_sec");
    bench.session.handle_shutdown(bench.now);
    assert_eq!(ask(&mut bench, "l", &Ask { names: &["d"], ..SYNC }), refused(1));
}

#[test]
fn an_element_type_has_lmcaches_name() {
    // Broken in production: no LMCache sender of a float16 model is ever served.
    let mut bench = Bench::with(2, 2, |settings| {
        settings.chunk.dtype = "float16".into();
        settings.pages = Some(Pages { memory_type: 0, device: 0, address: BUFFER, page_bytes: 16, count: 0 });
    });
    shake_hands(&mut bench, "l", 16).unwrap();
    let with = |dtype| Ask { names: &["a"], dtype, ..SYNC };
    assert_eq!(ask(&mut bench, "l", &with("bfloat16")), Some((vec![], vec![-1])));
    assert_eq!(ask(&mut bench, "l", &with("half")), Some((vec![], vec![0])));
}

#[test]
fn a_sender_whose_chunks_are_others_gets_no_pages() {
    // Broken in production: page 7 of a sender with other chunks is the middle of our page 3.
    let mut bench = lmcache_bench(2);
    assert_eq!(shake_hands(&mut bench, "n", 32), Err(()));
    let mut local = Bench::new(2);
    assert_eq!(shake_hands(&mut local, "n", 16), Err(()), "no engine that could take its writes");
    assert_eq!(ask(&mut local, "n", &Ask { names: &["a"], ..SYNC }), Some((vec![], vec![-1])));
    let never_loaded = MemRegRequest {
        remote_agent_name: b"lmcache-agent-1".to_vec(),
        local_id: String::new(),
        local_xfer_dlist_bytes: b"cos\nsystem\n(S'true'\ntR.".to_vec(),
        pd: None,
    };
    let said = bench.say(Port::Init, "n", Message::NixlMemRegRequest(never_loaded));
    let [(_, Message::NixlMemRegResponse(response))] = said.as_slice() else { panic!("{said:?}") };
    assert!(response.remote_xfer_dlist_bytes.is_empty());
}

#[test]
fn chunks_that_are_asked_after_stay_for_as_long_as_a_read_may_take() {
    // Broken in production: an LMCache sender reads cached pages that were granted to somebody else meanwhile.
    let mut bench = lmcache_bench(2);
    ask(&mut bench, "l", &Ask { names: &["a", "b"], ..SYNC });
    let (found, _) = look_up(&mut bench, &["b", "a"], true);
    assert_eq!(found, [Some(16), Some(16)]);
    bench.session.handle_client_gone(bench.now, ClientId(1));
    let query = CacheQueryRequest { keys: keys(&["x", "b"]) };
    let said = bench.say(Port::Query, "q", Message::CacheQueryRequest(query));
    let [(_, Message::CacheQueryResponse(answer))] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!((answer.cached_keys.clone(), answer.cached_indexes.clone()), (keys(&["b"]), vec![1]), "its page");
    assert_eq!(ask(&mut bench, "m", &Ask { names: &["c", "d"], ..SYNC }), None, "b is being read");
    let said = later(&mut bench, 10);
    assert_eq!(answer_to(&said, "m").map(|(_, pages)| pages.len()), Some(2), "pd_write_timeout_sec has passed");
}

fn counts(bench: &Bench) -> (u32, u32, usize) {
    let counts = bench.session.counts();
    (counts.slots.reserved, counts.slots.quarantined, bench.counts().requests_active)
}

#[test]
fn pages_for_batches_that_do_not_come_are_free() {
    // Broken in production: a sender that announces more than it sends takes pages with it for good.
    let mut bench = lmcache_bench(6);
    let batch = |names, last| Ask { names, req_id: Some("r"), total: Some(5), last, ..SYNC };
    for last in [Some(true), None] {
        assert_eq!(ask(&mut bench, "l", &batch(&["a"], last)), Some((vec![], vec![-1])), "one of five, and the last");
        assert_eq!(counts(&bench), (0, 0, 0));
    }
    assert_eq!(ask(&mut bench, "l", &batch(&["a"], Some(false))), Some((vec![], vec![0])));
    assert_eq!(counts(&bench), (5, 0, 1));
    assert_eq!(ask(&mut bench, "l", &batch(&["b"], Some(true))), Some((vec![], vec![-1])), "two of five");
    let cancel = CancelNotif { req_id: RequestId::new("r").unwrap(), keys: keys(&["a"]), pd: None };
    bench.say(Port::Alloc, "l", Message::CancelNotif(cancel));
    assert_eq!(counts(&bench), (0, 1, 0), "a may still be written, and the others were never told of");
}

#[test]
fn a_request_is_not_ready_with_its_last_batches_alone() {
    // Broken in production: the first half of a prompt expires, or decode gives it up, the prefill engine goes on, and decode
    // is given the second half as the whole.
    let mut bench = lmcache_bench(6);
    let batch = |names, last| Ask { names, req_id: Some("r"), total: Some(4), last: Some(last), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &batch(&["a"], false)), Some((vec![], vec![0])));
    later(&mut bench, 20);
    assert_eq!(counts(&bench), (0, 1, 0), "nobody has fetched it");
    assert_eq!(ask(&mut bench, "l", &batch(&["c", "d"], true)), Some((vec![], vec![-1, -1])));
    // One in the middle may be a first one. Its last is told of.
    assert_eq!(ask(&mut bench, "l", &batch(&["b"], false)).map(|(_, pages)| pages.len()), Some(1));
    assert_eq!(ask(&mut bench, "l", &batch(&["c", "d"], true)), Some((vec![], vec![-1, -1])));
    bench.session.handle_wait(bench.now, ClientId(1), Seq(70), RequestId::new("r").unwrap(), None, true);
    assert!(!matches!(answer_of(&mut bench, 70), Some(Answer::Ready { .. })));
}

#[test]
fn requests_that_had_nothing_to_write_do_not_pile_up() {
    // Broken in production: a prefill worker whose prefixes are all there already is refused after 512 of them.
    let mut bench = lmcache_bench(4);
    ask(&mut bench, "l", &Ask { names: &["a", "b"], ..SYNC });
    look_up(&mut bench, &["a", "b"], true);
    for _ in 0..2000 {
        assert_eq!(ask(&mut bench, "l", &Ask { names: &["a", "b"], ..SYNC }), Some((vec![0, 1], vec![])));
        look_up(&mut bench, &["b", "a", "x"], true);
        assert_eq!(counts(&bench), (0, 0, 0));
    }
    // Those that nobody looks up are held for as long as any, and are no failures.
    ask(&mut bench, "l", &Ask { names: &["a"], ..SYNC });
    later(&mut bench, 21);
    assert_eq!((counts(&bench), bench.counts().requests_failed), ((0, 0, 0), 0));
}

#[test]
fn a_restarted_sender_takes_its_request_up_again() {
    // Broken in production: the request that a prefill worker had when it died cannot be sent by the next one.
    let mut bench = lmcache_bench(6);
    let named = Ask { names: &["a"], req_id: Some("r"), total: Some(1), last: Some(true), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &named), Some((vec![], vec![0])));
    assert_eq!(ask(&mut bench, "m", &named), Some((vec![], vec![-1])), "the first is there");
    bench.session.handle_route_gone(bench.now, &"l");
    assert_eq!(ask(&mut bench, "m", &named), Some((vec![], vec![1])), "and its page may still be written");
    later(&mut bench, 2);
    assert_eq!(counts(&bench), (1, 0, 1));
    bench.session.handle_route_gone(bench.now, &"m");
    let (_, answers) = bench.alloc("a", "r", &["k"]);
    assert!(answers[0].1.pd.as_ref().unwrap().refusal.is_none(), "a pd-sender may take it up as well");
}

#[test]
fn a_reader_goes_on_waiting_when_its_request_is_asked_for_again() {
    // Broken in production: an LMCache sender, or the one that takes its place, tries again, and decode, which has waited since
    // before, is told that the first attempt has ended.
    let mut bench = lmcache_bench(6);
    let named = Ask { names: &["a"], req_id: Some("r"), total: Some(1), last: Some(true), ..SYNC };
    assert_eq!(wait(&mut bench, 50, "r", None), None);
    for route in ["l", "l", "m"] {
        if route == "m" {
            bench.session.handle_route_gone(bench.now, &"l");
        }
        bench.session.handle_port_message(bench.now, Port::Alloc, route, named.message());
        assert_eq!(answer_of(&mut bench, 50), None, "{route} asks for it");
    }
    bench.session.handle_wait(bench.now, ClientId(2), Seq(51), RequestId::new("r").unwrap(), None, true);
    assert!(matches!(answer_of(&mut bench, 50), Some(Answer::Ready { .. })));
}

#[test]
fn a_refusal_is_told_to_decode_as_well() {
    // Broken in production: an LMCache sender is refused, tells nobody, and decode waits for its deadline.
    let mut bench = lmcache_bench(2);
    let large = Ask { names: &["a", "b", "c"], req_id: Some("r"), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &large), Some((vec![], vec![-1; 3])));
    assert_eq!(kind_of(wait(&mut bench, 50, "r", None)), Some(FailureKind::TooLarge));
    assert_eq!(wait(&mut bench, 51, "r", None), None, "once");
}

#[test]
fn a_pd_senders_request_and_names_are_its_own() {
    // Broken in production: a stranger's allocation drops what is ready, or its handshake frees pages that are written.
    let mut bench = lmcache_bench(6);
    let (_, answers) = bench.alloc("a", "r", &["k"]);
    bench.commit("a", "r", grant_of(&answers));
    let named = Ask { names: &["x"], req_id: Some("r"), total: Some(1), last: Some(true), ..SYNC };
    assert_eq!(ask(&mut bench, "l", &named), Some((vec![], vec![-1])));
    let Some(Answer::Ready { chunks, .. }) = wait(&mut bench, 90, "r", None) else { panic!() };
    assert_eq!(chunks[0].key.to_string(), "k");
    let refusal = bench.shake_hands("lmcache-2", Vec::new()).refusal.unwrap();
    assert!(refusal.text.contains("lmcache-"), "{refusal}");
}

#[test]
fn a_receiver_that_wants_checksums_of_all_takes_no_sender_without() {
    // Broken in production: an operator who asked for checks gets chunks that nobody summed.
    let mut bench = Bench::with(2, 2, |settings| {
        settings.checksum = pd_backend::ids::ChecksumMode::Full;
        settings.pages = Some(Pages { memory_type: 0, device: 0, address: BUFFER, page_bytes: 16, count: 0 });
    });
    assert_eq!(shake_hands(&mut bench, "l", 16), Err(()));
}

#[test]
fn an_lmcache_sender_evicts_only_within_the_pages_that_it_knows() {
    // Broken in production: an LMCache sender that knows the first pages of a buffer that has grown since empties all of it.
    let mut bench = Bench::with(1, 3, |settings| {
        settings.pages = Some(Pages { memory_type: 0, device: 0, address: 0x10_0000, page_bytes: 16, count: 0 });
    });
    let init = Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd: None });
    let said = bench.say(Port::Init, "l", init);
    let [(_, Message::NixlInitResponse(response))] = said.as_slice() else { panic!("{said:?}") };
    let theirs = Pages { memory_type: 0, device: 0, address: 0x9000, page_bytes: 16, count: 3 };
    let register = MemRegRequest {
        remote_agent_name: response.remote_agent_name.clone(),
        local_id: String::new(),
        local_xfer_dlist_bytes: descriptor_list::encode("nixl_cu13._bindings", &theirs),
        pd: None,
    };
    bench.say(Port::Init, "l", Message::NixlMemRegRequest(register));
    cache(&mut bench, "held", &["k0"]);
    assert_eq!(there(&mut bench, &["k0"], true), [true]);
    bench.alloc("a", "r", &["k1", "k2"]);
    bench.known_len_bytes = 16;
    assert!(bench.grown(Ok(())).is_empty());
    let granted = bench.grown(Ok(()));
    bench.commit("a", "r", grant_of(&granted));
    let Some(Answer::Ready { lease, .. }) = wait(&mut bench, 5, "r", None) else { panic!("not ready") };
    bench.session.handle_release(bench.now, ClientId(1), Seq(6), lease);
    bench.drain();
    let request = AllocRequest {
        keys: vec![ChunkKey::new("x").unwrap()],
        fmt: 1,
        shape: vec![2, 1, 4, 2],
        dtype: "uint8".into(),
        last_chunk_toks: 4,
        req_id: None,
        is_last_batch: None,
        total_chunks: None,
        pd: None,
    };
    assert!(bench.say(Port::Alloc, "l", Message::AllocRequest(request)).is_empty(), "its only page is being read");
    assert_eq!(there(&mut bench, &["k1", "k2"], false), [true, true]);
    bench.session.handle_client_gone(bench.now, ClientId(1));
    assert_eq!(answers(bench.drain()).len(), 1);
    assert_eq!(there(&mut bench, &["k0", "k1", "k2"], false), [false, true, true]);
}

#[test]
fn what_comes_to_another_port_is_refused_there() {
    // Broken in production: an LMCache sender that was given wrong ports waits for ever for its answer.
    let mut bench = lmcache_bench(4);
    let init = || Message::NixlInitRequest(InitRequest { local_meta_bytes: vec![3], pd: None });
    let register = || {
        Message::NixlMemRegRequest(MemRegRequest {
            remote_agent_name: b"lmcache-agent-1".to_vec(),
            local_id: String::new(),
            local_xfer_dlist_bytes: Vec::new(),
            pd: None,
        })
    };
    let alloc = || Ask { names: &["a", "b"], ..SYNC }.message();
    let cancel = || Message::CancelNotif(CancelNotif { req_id: RequestId::new("r").unwrap(), keys: vec![], pd: None });
    let query = || Message::CacheQueryRequest(CacheQueryRequest { keys: keys(&["a"]) });
    let before = bench.session.counts();
    for (ports, message) in [
        ([Port::Alloc, Port::Query], init as fn() -> Message),
        ([Port::Alloc, Port::Query], register),
        ([Port::Init, Port::Query], alloc),
        ([Port::Init, Port::Query], cancel),
        ([Port::Init, Port::Alloc], query),
    ] {
        for port in ports {
            bench.session.handle_port_message(bench.now, port, "l", message());
            let mut answers = Vec::new();
            let mut noted = Vec::new();
            while let Some(output) = bench.session.poll_output() {
                match output {
                    Output::Send { to: To::Route("l"), port: from, message } if from == port => answers.push(message),
                    Output::Note(node::Note::Incoming(note)) => noted.push(note),
                    other => panic!("{other:?}"),
                }
            }
            let message = message();
            let [answer] = answers.as_slice() else { panic!("{port:?} {}: {answers:?}", message.type_name()) };
            match (&message, answer) {
                (Message::NixlInitRequest(_), Message::NixlInitResponse(answer)) => {
                    assert!(answer.remote_meta_bytes.is_empty() && answer.pd.is_none());
                }
                (Message::NixlMemRegRequest(_), Message::NixlMemRegResponse(answer)) => {
                    assert!(answer.remote_xfer_dlist_bytes.is_empty() && answer.pd.is_none());
                }
                (Message::AllocRequest(_), Message::AllocResponse(answer)) => {
                    assert_eq!((answer.remote_indexes.as_slice(), answer.pd.is_none()), (&[-1, -1][..], true));
                }
                (Message::CancelNotif(_), Message::AllocResponse(answer)) => assert!(answer.remote_indexes.is_empty()),
                (Message::CacheQueryRequest(_), Message::CacheQueryResponse(answer)) => {
                    assert!(answer.cached_keys.is_empty());
                }
                (_, answer) => panic!("{port:?} {}: {answer:?}", message.type_name()),
            }
            // Whose it was is in the log.
            let message = message.type_name();
            assert_eq!(noted, [IncomingNote::Unexpected { from: "l", port, message }]);
        }
    }
    assert_eq!(bench.session.counts(), before, "nothing else has come of it");
}
