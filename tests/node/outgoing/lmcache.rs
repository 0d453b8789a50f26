//! The sender's session with a receiver of LMCache's, in both of its modes.

use pd_backend::ids::{ChunkKey, Failure, FailureKind, ReceiverAddress, Seq};
use pd_backend::node::Port;
use pd_backend::node::outgoing::{Event, OpenRequest};
use pd_backend::node::{Answer, NodeSettings, PeerMemory};
use pd_backend::wire::message::{AllocRequest, AllocResponse, Pong};
use pd_backend::wire::{LmcacheMode, Message};

use super::lmcache_bench::*;

#[test]
fn a_request_is_sent_once_its_last_write_has_ended() {
    // Broken in production: the proxy is told of pages that are still being written, or twice, or never.
    for mode in both() {
        let mut bench = Bench::new(mode);
        assert_eq!(bench.open("r", &[1, 2]), Vec::<u32>::new());
        assert_eq!(bench.memory, [PeerMemory::Pages(bench.lmcache.pages)]);
        let (transfer, pages) = bench.send("r", &[0, 1]);
        assert_eq!(pages, [0, 1]);
        assert!(bench.events.is_empty() && bench.proxy.is_empty());
        bench.written(transfer);
        bench.written(transfer);
        let [Event::Sent { chunks: 2, bytes: 32, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
        assert_eq!(bench.proxy, [request("r")]);
        // Nothing is under way, and nothing is said: no pings, no commits.
        bench.later(60);
        assert!(bench.session.is_drained() && bench.events.len() == 1 && bench.opened.len() == 1);
        // What it has is not sent again.
        assert_eq!(bench.open("s", &[1, 2, 3]), [0, 1]);
        let (transfer, pages) = bench.send("s", &[2]);
        assert_eq!(pages, [2]);
        bench.written(transfer);
        assert_eq!(bench.proxy, [request("r"), request("s")]);
    }
}

#[test]
fn it_is_asked_in_lmcaches_words() {
    // Broken in production: a synchronous receiver fails on a dtype or a key, and answers nobody until it is restarted.
    let mut bench = Bench::new(LmcacheMode::Sync);
    bench.ask("r", &[1, 2]);
    let Some(Message::AllocRequest(asked)) = bench.lmcache.asked.front() else { panic!("{:?}", bench.lmcache.asked) };
    let expected = AllocRequest {
        keys: vec![key(1), key(2)],
        fmt: 1,
        shape: vec![2, 1, 4, 1],
        dtype: "half".into(),
        last_chunk_toks: 4,
        req_id: Some(request("r")),
        is_last_batch: Some(true),
        total_chunks: Some(2),
        pd: None,
    };
    assert_eq!(*asked, expected);
    bench.answer_all();
    let open = OpenRequest {
        id: request("odd"),
        keys: vec![ChunkKey::new("m@1@0@xyz@half").unwrap()],
        groups: Vec::new(),
        last_chunk_tokens: 4,
        receiver: ReceiverAddress { host: "r".into(), init_port: 1, alloc_port: 2 },
        wait: None,
        stage: false,
    };
    bench.session.handle_open(bench.now, CLIENT, Seq(1), open);
    bench.pump();
    let failure = bench.failure(Seq(1));
    assert_eq!(failure.kind, FailureKind::BadRequest);
    assert!(failure.text.contains("m@1@0@xyz@half is not one that an LMCache receiver can read"), "{failure}");
    assert!(bench.lmcache.asked.is_empty());
}

#[test]
fn a_receiver_that_means_something_else_by_a_chunk_is_refused() {
    // Broken in production: pages of another length are written, and every chunk but the first is wrong.
    let refused = |settings: NodeSettings, page_bytes: u64| {
        let mut lmcache = Lmcache::new(LmcacheMode::Sync, 6);
        lmcache.pages = pages(1 << 30, page_bytes, 6);
        let mut bench = Bench::with(settings, lmcache);
        let id = bench.ask("r", &[1]);
        assert!(bench.lmcache.asked.is_empty());
        bench.failure(id)
    };
    let failure = refused(settings(), 32);
    assert_eq!(failure.kind, FailureKind::LayoutMismatch);
    assert!(
        failure.text.contains("receiver r:1/2 (LMCache) has 32 bytes and a chunk of this sender has 16"),
        "{failure}"
    );
    let failure = refused(NodeSettings { pages: None, hello: hello("local"), ..settings() }, 16);
    assert_eq!(failure.kind, FailureKind::HandshakeRefused);
    assert!(failure.text.contains("moves bytes with local; set transfer_channel: nixl"), "{failure}");
    let mut grouped = settings();
    (grouped.chunk.token_bytes, grouped.chunk.whole) = (vec![4, 2], vec![false, false]);
    let failure = refused(grouped, 16);
    assert_eq!(failure.kind, FailureKind::LayoutMismatch);
    assert!(failure.text.contains("several groups of layers"), "{failure}");
    let mut windowed = settings();
    windowed.chunk.whole = vec![true];
    assert!(refused(windowed, 16).text.contains("the layout's chunks are blocks inside a window or states"));
    let mut strange = settings();
    strange.chunk.dtype = "float4".into();
    assert!(refused(strange, 16).text.contains("no element type float4"));
}

#[test]
fn pages_that_are_no_list_of_pages_are_refused() {
    // Broken in production: a receiver of a later LMCache is taken for one with no memory, and its requests hang.
    let mut bench = Bench::new(LmcacheMode::Sync);
    bench.lmcache.pages.count = 0;
    let id = bench.ask("r", &[1]);
    assert_eq!(bench.failure(id).kind, FailureKind::HandshakeRefused);
}

#[test]
fn questions_are_asked_one_at_a_time_in_their_order() {
    // Broken in production: an asynchronous receiver answers the second request first, and each is written to the pages
    // of the other.
    let mut bench = Bench::new(LmcacheMode::Async);
    let ids: Vec<Seq> = (1..=3).map(|number| bench.ask(&format!("r{number}"), &[number])).collect();
    for (number, id) in (1u32..).zip(ids) {
        let Some(Message::AllocRequest(asked)) = bench.lmcache.asked.front() else {
            panic!("{:?}", bench.lmcache.asked)
        };
        assert_eq!(asked.keys, [key(number)]);
        let response = bench.lmcache.answer().unwrap();
        bench.hear(response);
        assert!(matches!(bench.answer_to(id), Answer::Opened { .. }));
        let (_, pages) = bench.send(&format!("r{number}"), &[0]);
        assert_eq!(pages, [bench.page_of(number)]);
    }
    // An answer that nobody waits for changes nothing.
    bench.hear(AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![5], pd: None });
    bench.session.handle_connection_message(
        bench.now,
        bench.opened[0],
        Port::Alloc,
        Message::PdPong(Pong { seq: Seq(1), refusal: None, have_ended: Vec::new() }),
    );
    bench.pump();
    assert!(bench.events.is_empty());
}

#[test]
fn an_answer_that_grants_nothing_fails_its_request_alone() {
    // Broken in production: page -1 is written, which is another process's memory or a crash.
    let mut bench = Bench::new(LmcacheMode::Async);
    let id = bench.ask("r", &[1, 2, 3, 4, 5, 6, 7]);
    let behind = bench.ask("s", &[1]);
    bench.answer_all();
    let failure = bench.failure(id);
    assert_eq!(failure.kind, FailureKind::NoSlots);
    assert!(
        failure.text.contains("receiver r:1/2 (LMCache) answered that it has no room, or does not accept"),
        "{failure}"
    );
    assert!(matches!(bench.answer_to(behind), Answer::Opened { .. }));
    assert_eq!(bench.opened.len(), 1);
    for (indexes, already_sent) in [
        (vec![6], vec![]),
        (vec![1, 2], vec![]),
        (vec![], vec![]),
        (vec![], vec![1]),
        (vec![1], vec![0]),
        (vec![i64::MAX], vec![]),
    ] {
        let id = bench.ask("t", &[9]);
        bench.lmcache.asked.clear();
        bench.hear(AllocResponse { already_sent_indexes: already_sent, remote_indexes: indexes, pd: None });
        let failure = bench.failure(id);
        assert_eq!(failure.kind, FailureKind::Other);
        assert!(failure.text.contains("expected different pages below 6"), "{failure}");
    }
    let id = bench.ask("t", &[9, 10]);
    bench.lmcache.asked.clear();
    bench.hear(AllocResponse { already_sent_indexes: vec![], remote_indexes: vec![3, 3], pd: None });
    assert_eq!(bench.failure(id).kind, FailureKind::Other);
}

#[test]
fn what_a_failed_request_was_granted_is_written_by_the_next_that_has_the_key() {
    // Broken in production: a retry is reported sent, the proxy is told, and every page is wrong.
    let mut bench = Bench::new(LmcacheMode::Sync);
    bench.open("r", &[1, 2]);
    bench.cancel("r");
    // The receiver says "already sent" of both.
    assert_eq!(bench.open("r", &[1, 2, 3]), Vec::<u32>::new());
    let (transfer, pages) = bench.send("r", &[0, 1, 2]);
    assert_eq!(pages, [bench.page_of(1), bench.page_of(2), bench.page_of(3)]);
    let failure = Failure::new(FailureKind::TransferFailed, "no such memory");
    bench.session.handle_transfer_done(bench.now, transfer, Err(failure));
    bench.pump();
    assert!(bench.proxy.is_empty());
    bench.answers.clear();
    assert_eq!(bench.deliver("r", &[2, 1]), [bench.page_of(2), bench.page_of(1)]);
    // Now they are there; the third is not.
    assert_eq!(bench.open("s", &[1, 2, 3]), [0, 1]);
    assert_eq!(bench.proxy, [request("r")]);
}

#[test]
fn a_key_that_another_request_is_still_writing_is_not_taken_for_sent() {
    // Broken in production: the second of two requests with one prompt is decoded before its pages are written.
    for mode in both() {
        let mut bench = Bench::new(mode);
        bench.open("r", &[1]);
        assert_eq!(bench.open("s", &[1]), Vec::<u32>::new());
        let (_, first) = bench.send("r", &[0]);
        let (second, pages) = bench.send("s", &[0]);
        assert_eq!(first, pages);
        // The first gives up while the second goes on: its page stays the second's.
        let failure = Failure::new(FailureKind::TransferFailed, "no such memory");
        bench.session.handle_transfer_done(bench.now, bench.posts[0].0, Err(failure));
        bench.pump();
        bench.answer_all();
        assert_eq!(bench.page_of(1), pages[0]);
        bench.written(second);
        assert_eq!(bench.proxy, [request("s")]);
        assert_eq!(bench.open("t", &[1]), [0]);
    }
}

#[test]
fn an_asynchronous_receiver_is_told_once_nothing_is_written_any_more() {
    // Broken in production: it frees the pages at once, and a late write lands in another request's.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1, 2]);
    let (transfer, _) = bench.send("r", &[0, 1]);
    bench.cancel("r");
    assert!(bench.lmcache.asked.is_empty(), "{:?}", bench.lmcache.asked);
    bench.written(transfer);
    let Some(Message::CancelNotif(cancel)) = bench.lmcache.asked.front() else { panic!("{:?}", bench.lmcache.asked) };
    assert_eq!((&cancel.req_id, cancel.keys.as_slice()), (&request("r"), &[key(1), key(2)][..]));
    bench.answer_all();
    assert_eq!((bench.lmcache.free.len(), bench.lmcache.keys.len()), (6, 0));
    assert!(bench.proxy.is_empty());
    // A request that gave up before it was answered is given back as well.
    bench.ask("s", &[3]);
    bench.cancel("s");
    bench.answer_all();
    assert_eq!(bench.lmcache.free.len(), 6);
    bench.deliver("t", &[1, 2]);
}

#[test]
fn a_full_receiver_is_told_what_it_need_not_hold_while_it_is_asked_for_room() {
    // Broken in production: an asynchronous receiver that is full of a failed request's pages is asked for room, and is not
    // told that these are free until it has answered: both wait for each other, and all requests to it fail.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1, 2, 3, 4]);
    bench.open("s", &[5, 6]);
    let waits = bench.ask("t", &[1, 7]);
    bench.cancel("r");
    bench.cancel("s");
    let told = bench.answer_cancels();
    let told: Vec<(&str, Vec<ChunkKey>)> = told.iter().map(|told| (told.req_id.as_str(), told.keys.clone())).collect();
    assert_eq!(told, [("r", vec![key(1), key(2), key(3), key(4)]), ("s", vec![key(5), key(6)])]);
    bench.answer_all();
    assert!(matches!(bench.answer_to(waits), Answer::Opened { .. }));
    let (transfer, pages) = bench.send("t", &[0, 1]);
    assert_eq!(pages, [bench.page_of(1), bench.page_of(7)]);
    bench.written(transfer);
    assert_eq!(bench.proxy, [request("t")]);
    assert_eq!(bench.lmcache.keys.values().map(|(_, references)| *references).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn a_chunk_that_is_given_back_while_it_is_asked_for_is_in_doubt() {
    // Broken in production: the receiver pins a page for the retry, and then hears that the first attempt is over; the retry
    // is told "already sent" of a page that nobody has written, and is reported sent.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1]);
    let retry = bench.ask("s", &[1, 2]);
    let response = bench.lmcache.answer().unwrap();
    assert_eq!(response.already_sent_indexes, [0]);
    bench.cancel("r");
    assert_eq!(bench.answer_cancels().len(), 1);
    bench.hear(response);
    let failure = bench.failure(retry);
    assert!(failure.text.contains("has 1 of 2 chunks already, but an earlier attempt"), "{failure}");
    // It is given back as well, and then there is no doubt.
    bench.answer_all();
    assert_eq!((bench.lmcache.free.len(), bench.lmcache.keys.len()), (6, 0));
    bench.deliver("s", &[1, 2]);
}

#[test]
fn room_is_not_asked_for_chunks_that_are_being_given_back() {
    // Broken in production: the receiver pins a page for the second request before it hears that the first is over, and says
    // "already sent" of a page that nobody has written.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1, 2]);
    bench.cancel("r");
    let again = bench.ask("r", &[1]);
    let other = bench.ask("s", &[3]);
    assert_eq!(bench.lmcache.asked.len(), 1, "{:?}", bench.lmcache.asked);
    assert!(cancel(&bench.lmcache.asked[0]).is_some());
    bench.answer_all();
    assert!(matches!(bench.answer_to(again), Answer::Opened { .. }));
    assert!(matches!(bench.answer_to(other), Answer::Opened { .. }));
    assert_eq!(bench.lmcache.free.len(), 4);
}

#[test]
fn a_cancel_that_was_not_answered_leaves_a_doubt() {
    // Broken in production: the page is another request's by then, and the retry writes into it.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1]);
    bench.cancel("r");
    bench.lmcache.answer();
    bench.cut();
    // Another sender, another page.
    bench.lmcache.free.rotate_left(1);
    let page = bench.lmcache.free.pop_front().unwrap();
    bench.lmcache.keys.insert(key(1).as_str().to_owned(), (page, 1));
    let id = bench.ask("r", &[1]);
    bench.answer_all();
    let failure = bench.failure(id);
    assert!(failure.text.contains("has 1 of 1 chunks already, but an earlier attempt"), "{failure}");
    assert!(bench.posts.is_empty() && bench.proxy.is_empty());
    assert_eq!(bench.lmcache.keys[key(1).as_str()], (page, 1), "what the failed attempt pinned is given back");
}

#[test]
fn a_full_receiver_fails_requests_by_their_deadlines_and_keeps_its_connection() {
    // Broken in production: a late answer is taken for another request's; or the writes of all others fail because one
    // request did not fit.
    let mut bench = Bench::new(LmcacheMode::Sync);
    bench.open("writes", &[1, 2]);
    let (transfer, _) = bench.send("writes", &[0, 1]);
    let first = bench.ask("big", &[3, 4, 5, 6, 7]);
    let second = bench.ask("small", &[8]);
    bench.answer_all();
    bench.later(12);
    let failure = bench.failure(second);
    assert_eq!(failure.kind, FailureKind::Deadline);
    assert!(failure.text.contains("receiver r:1/2 (LMCache) is asked one thing at a time"), "{failure}");
    assert!(failure.text.contains("has not answered another request for 10000 ms"), "{failure}");
    bench.later(8);
    let failure = bench.failure(first);
    assert_eq!(failure.kind, FailureKind::Deadline);
    assert!(failure.text.contains("has not answered the allocation within 19000 ms"), "{failure}");
    bench.written(transfer);
    assert_eq!(bench.proxy, [request("writes")]);
    // Its answer comes when its engine has freed pages, and is nobody else's.
    let third = bench.ask("third", &[9]);
    bench.lmcache.release(&key(1));
    bench.lmcache.release(&key(2));
    bench.answer_all();
    assert!(matches!(bench.answer_to(third), Answer::Opened { .. }));
    assert_eq!(bench.send("third", &[0]).1, [bench.page_of(9)]);
    assert_eq!(bench.opened.len(), 1);
    // What the late answer granted is known.
    assert_eq!(bench.open("again", &[3]), Vec::<u32>::new());
    assert_eq!(bench.send("again", &[0]).1, [bench.page_of(3)]);
}

#[test]
fn a_receiver_that_never_answers_is_met_anew() {
    // Broken in production: a lost answer keeps every later request to that receiver waiting until this sender is restarted.
    let mut bench = Bench::new(LmcacheMode::Sync);
    bench.open("r", &[1]);
    bench.cancel("r");
    let lost = bench.ask("lost", &[1, 2]);
    // It is granted, and nobody hears of it.
    bench.lmcache.answer();
    bench.later(295);
    assert_eq!(bench.failure(lost).kind, FailureKind::Deadline);
    assert_eq!(bench.opened.len(), 1);
    let waits = bench.ask("waits", &[3]);
    bench.later(6);
    assert_eq!(bench.opened.len(), 2);
    bench.answer_all();
    assert!(matches!(bench.answer_to(waits), Answer::Opened { .. }), "asked anew");
    // Of what was granted before, the page is known; of what was granted unheard, it is not.
    assert_eq!(bench.open("s", &[1]), Vec::<u32>::new());
    assert_eq!(bench.send("s", &[0]).1, [bench.page_of(1)]);
    let id = bench.ask("t", &[2]);
    bench.answer_all();
    assert_eq!(bench.failure(id).kind, FailureKind::Other);
    assert!(bench.proxy.is_empty());
}

#[test]
fn a_receiver_that_is_met_again_still_holds_what_it_was_left_with() {
    // Broken in production: a connection breaks, the retry is told "already sent" of pages that nobody wrote.
    for mode in both() {
        let mut bench = Bench::new(mode);
        bench.open("r", &[1]);
        bench.cut();
        let [Event::Failed { failure, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
        assert_eq!(failure.kind, FailureKind::PeerLost);
        let page = bench.page_of(1);
        assert_eq!(bench.deliver("r", &[1]), [page]);
        // Granted, but the answer is lost with the connection.
        let id = bench.ask("s", &[2]);
        bench.lmcache.answer();
        bench.cut();
        assert_eq!(bench.failure(id).kind, FailureKind::PeerLost);
        let id = bench.ask("s", &[2]);
        bench.answer_all();
        assert_eq!(bench.failure(id).kind, FailureKind::Other);
        assert_eq!(bench.proxy, [request("r")]);
        // Another process at its address knows nothing of it.
        bench.cut();
        bench.lmcache = Lmcache { metadata: vec![3], ..Lmcache::new(mode, 6) };
        bench.lmcache.keys.insert(key(2).as_str().to_owned(), (5, 1));
        assert_eq!(bench.open("s", &[2]), [0]);
    }
}

#[test]
fn a_request_that_stays_open_is_ended_by_our_own_deadline() {
    // Broken in production: a connector that forgets a request keeps pages of a receiver that never takes them back.
    let mut bench = Bench::new(LmcacheMode::Async);
    bench.open("r", &[1]);
    bench.later(31);
    let [Event::Failed { failure, .. }] = bench.events.as_slice() else { panic!("{:?}", bench.events) };
    assert_eq!(failure.kind, FailureKind::Deadline);
    bench.answer_all();
    assert_eq!(bench.lmcache.free.len(), 6);
}
