"""The dialect of vllm-ascend's layerwise proxy, without vLLM: decode has its router ask prefill."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

import pytest

from answering import Answering, answering, says, says_little_by_little, says_nothing
from free_ports import free_ports
from pd_backend.vllm import metaserver
from pd_backend.vllm.hosts import HostList
from pd_backend.vllm.metaserver import Metaservers, Post, metaserver_of
from pd_backend.vllm.naming import Naming
from pd_backend.vllm.options import Options
from pd_backend.vllm.consumer_scheduler import ConsumerScheduler
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.spec import DisaggSpec, SpecError, prefill_spec
from test_vllm_scheduler import BLOCK, CHUNK, output, request
from waiting import eventually

#: What the proxy was recorded to send to decode.
ASKED = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": "http://127.0.0.1:18000/v1/metaserver"}
REQUEST = "cmpl-820fabeb-aac0-4a34-b3d9-76773a8b7997-0-1a2b3c4d"


def receivers(req_id: str) -> DisaggSpec:
    return DisaggSpec(req_id, "10.0.0.2", (7300, 7301), (7400, 7401))


def ended(post: Post) -> Post:
    return eventually(lambda: post if post.ended is not None else None)


def is_posted(servers: Metaservers) -> bool:
    """Whether there was a place for a post, which has ended."""
    try:
        ended(servers.post("http://router-0:8000/", REQUEST, "r"))
    except SpecError:
        return False
    return True


class TestMetaservers:
    def test_prefill_is_told_what_lmcaches_routers_say(self) -> None:
        # Broken in production: the router does not know the request again, or prefill does not know where to send to.
        with answering(says("200 OK", b"null")) as (port, heard):
            servers = Metaservers(receivers)
            post = ended(servers.post(f"http://127.0.0.1:{port}/v1/metaserver", REQUEST, "layerwise r"))
            post.check()
        head, body = heard[0].split(b"\r\n\r\n", 1)
        assert head.startswith(b"POST /v1/metaserver HTTP/1.1\r\n")
        said = json.loads(body)
        # As vLLM names it, without the suffix that no router knows.
        assert said["request_id"] == "cmpl-820fabeb-aac0-4a34-b3d9-76773a8b7997-0"
        assert (said["do_remote_decode"], said["do_remote_prefill"], said["remote_host"]) == (True, False, "10.0.0.2")
        assert prefill_spec(said, 2) == receivers("layerwise r")

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (says("500 Internal Server Error", b"{}"), "status 500; expected 200"),
            (says("307 Temporary Redirect", b"", "Location: http://127.0.0.1:1/"), "status 307; expected 200"),
            (says_nothing, "no answer within 0.5 s"),
            (says_little_by_little, "no answer within 0.5 s"),
            (lambda connection: None, ""),
            (lambda connection: connection.sendall(b"\x1b[31m\x0b garbage\r\n\r\n"), ""),
        ],
        ids=["500", "redirect", "silent", "slow", "ends", "garbage"],
    )
    def test_a_router_that_does_not_is_told_in_a_line(self, answer: Answering, text: str) -> None:
        # Broken in production: a request waits for ever for chunks that nobody computes.
        with answering(answer) as (port, _):
            post = ended(Metaservers(receivers, wait_s=0.5).post(f"http://127.0.0.1:{port}/", REQUEST, "r"))
        with pytest.raises(SpecError) as refused:
            post.check()
        assert text in str(refused.value) and len(str(refused.value)) < 300 and str(refused.value).isprintable()

    def test_nobody_there(self) -> None:
        # Broken in production: a router that has gone costs each request of it minutes.
        for url in (f"http://127.0.0.1:{free_ports(1)[0]}/", "http://no.such.host.invalid/"):
            with pytest.raises(SpecError):
                ended(Metaservers(receivers).post(url, REQUEST, "r")).check()

    def test_nothing_comes_of_an_answer_for_ever(self) -> None:
        # Broken in production: the router says that all is well, prefill had failed, and decode waits for minutes.
        post = Post(ended=0.0)
        with pytest.raises(SpecError, match="nothing came; see prefill's log"):
            post.check()
        Post().check()

    def test_hosts_that_are_not_on_the_list_are_not_asked(self) -> None:
        # Broken in production: any client has decode post wherever it says.
        with answering(says("200 OK")) as (port, heard):
            servers = Metaservers(receivers, hosts=HostList(["10.0.0.0/8"]))
            with pytest.raises(SpecError, match="not among pd_prefill_hosts"):
                servers.post(f"http://127.0.0.1:{port}/", REQUEST, "r")
            assert heard == []

    def test_few_are_waited_for_at_a_time_and_not_all_of_one_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Broken in production: one client has decode start as many threads as it sends requests; or by naming a host that never
        # answers it keeps everybody else's requests from being prefilled; or a place is lost with each router that fails.
        answered = threading.Event()
        monkeypatch.setattr(metaserver, "_post", lambda *_: answered.wait(60))
        servers = Metaservers(receivers)
        posts: list[Post] = []
        for host, text in [
            ("router-0", "128 requests are being prefilled by way of a metaserver at router-0 already"),
            ("ROUTER-0", "at router-0 already"),
            ("router-1", "256 requests are being prefilled by way of a metaserver already"),
            ("router-2", "256 requests are being prefilled by way of a metaserver already"),
        ]:
            with pytest.raises(SpecError, match=text):
                for _ in range(129):
                    posts.append(servers.post(f"http://{host}:8000/", REQUEST, "r"))
        assert len(posts) == 256
        answered.set()
        for post in posts:
            ended(post)

        def fail(*_: Any) -> None:
            raise OSError("refused")

        monkeypatch.setattr(metaserver, "_post", fail)
        for _ in range(300):
            # Its place may be free a moment after it has ended.
            eventually(lambda: is_posted(servers))

    def test_a_machine_that_gives_no_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Broken in production: the limit of processes ends the engine, with every request in it; or each refusal costs a place.
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with answering(says("200 OK", b"null")) as (port, _):
            servers, url = Metaservers(receivers), f"http://127.0.0.1:{port}/"
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", refuse)
                for _ in range(300):
                    with pytest.raises(SpecError, match="no further thread: can't start new thread"):
                        servers.post(url, REQUEST, "r")
            ended(servers.post(url, REQUEST, "r")).check()

    def test_a_machine_that_gives_no_thread_for_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Broken in production: nobody was asked, and the request waits as if its router had said that all is well.
        def refuse(_: threading.Timer) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Timer, "start", refuse)
        with answering(says("200 OK", b"null")) as (port, _):
            with pytest.raises(SpecError, match="its metaserver: can't start new thread"):
                ended(Metaservers(receivers).post(f"http://127.0.0.1:{port}/", REQUEST, "r")).check()

    @pytest.mark.parametrize(
        "given",
        [7, None, "", {}, "x" * 10_000, "http://h/" + "x" * 10_000, "https://h/", "file:///etc/passwd", "http://u:p@h/",
         "http://h:99999/", "http://h/a b", "http://h/\r\nX: y", "http://[::1", "http://ä/", "//h/"],
    )
    def test_no_address(self, given: Any) -> None:
        # Broken in production: what a client writes into its request ends the engine, or fills its log.
        with pytest.raises(SpecError) as refused:
            metaserver_of(ASKED | {"metaserver": given})
        assert len(str(refused.value)) < 200

    def test_other_dialects_have_none(self) -> None:
        # Broken in production: a request of another dialect is posted somewhere.
        assert metaserver_of(ASKED) == ASKED["metaserver"]
        for other in (None, {}, ASKED | {"do_remote_prefill": False}, ASKED | {"disagg_spec": {"req_id": "r"}}):
            assert metaserver_of(other) is None

    def test_where_the_receivers_are(self) -> None:
        # Broken in production: prefill is told to send to an address that stands for every address.
        assert Options().receiver_host() is None
        for sets, host in (
            ({"pd_peer_host": "10.0.0.2"}, "10.0.0.2"), ({"pd_peer_host": "0.0.0.0"}, None),
            ({"pd_peer_host": "0.0.0.0", "pd_advertise_host": "10.0.0.3"}, "10.0.0.3"), ({"nixl_peer_host": "h"}, "h"),
        ):
            assert Options.parse({"set": sets}).receiver_host() == host


class Played:
    """Metaservers that are played."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str, str]] = []
        self.what = Post()
        self.refusal: str | None = None

    def post(self, url: str, request_id: str, req_id: str) -> Post:
        if self.refusal is not None:
            raise SpecError(self.refusal)
        self.posts.append((url, request_id, req_id))
        return self.what


class TestDecode:
    def scheduler(self, servers: Played) -> ConsumerScheduler:
        return ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 1000, 1, None, Naming(), metaservers=servers)  # type: ignore

    def test_chunks_are_waited_for_without_blocks(self) -> None:
        # Broken in production: decode computes the prompt meanwhile, or holds blocks for what never comes.
        servers = Played()
        scheduler = self.scheduler(servers)
        one = request(700, dict(ASKED))
        scheduler.arrived(one)
        assert servers.posts == [(ASKED["metaserver"], "a", "layerwise a")]
        assert scheduler.build(output()).announced == [("a", "layerwise a")]
        assert scheduler.matched(one, 0) == (None, False)
        # They come before the router has heard that prefill has ended, or after.
        scheduler.here(["a"])
        assert scheduler.matched(one, 0) == (700, True)
        scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 700)
        (load,) = scheduler.build(output()).loads
        assert (load.req_id, load.remote) == ("layerwise a", None)
        scheduler.received(["a"], ())
        scheduler.finished(one)
        assert scheduler.build(output()).dropped == [] and not scheduler.pending() and len(servers.posts) == 1

    @pytest.mark.parametrize("when", ["at once", "later"])
    def test_what_cannot_be_prefilled_is_computed(self, when: str, caplog: pytest.LogCaptureFixture) -> None:
        # Broken in production: a request waits for minutes because its router has failed.
        servers = Played()
        servers.refusal = "why" if when == "at once" else None
        scheduler = self.scheduler(servers)
        one = request(700, dict(ASKED))
        with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
            scheduler.arrived(one)
            if when == "later":
                assert scheduler.matched(one, 0) == (None, False)
            servers.what.error, servers.what.ended = "why", 0.0
            assert scheduler.matched(one, 0) == scheduler.matched(one, 0) == (0, False)
        assert [record.getMessage().removesuffix("why") for record in caplog.records] in (
            ["request a is computed here: "], ["request a is computed here: its metaserver: "]
        )
        assert scheduler.build(output()).dropped == (["a"] if when == "later" else [])
        scheduler.returned(["a"])
        scheduler.finished(one)
        assert scheduler.build(output()).dropped == [] and not scheduler.pending()

    def test_what_is_here_already_waits_for_nobody(self) -> None:
        # Broken in production: a prompt that decode has in its own cache waits for prefill.
        scheduler = self.scheduler(Played())
        one = request(256, dict(ASKED))
        scheduler.arrived(one)
        assert scheduler.matched(one, 256) == (0, False)
        scheduler.allocated(one, ([1, 2],), 0)
        assert scheduler.build(output()).unneeded == ["a"]

    def test_nothing_is_posted_for_what_is_not_computed_elsewhere(self) -> None:
        # Broken in production: prefill computes for nobody, at each refusal and each client that leaves.
        servers = Played()
        scheduler = self.scheduler(servers)
        # vLLM's own, after a refusal or a disconnect.
        scheduler.finished(request(1, dict(ASKED)))
        one = request(700, dict(ASKED), "b")
        one.prompt_token_ids = None
        scheduler.arrived(one)
        assert scheduler.matched(one, 0) == (0, False)
        assert servers.posts == [] and not scheduler.pending()

    @pytest.mark.parametrize("first", ["decode", "left"])
    def test_one_server_for_both_parts_waits_for_its_own_prefill_alone(
        self, first: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        # Broken in production: under a layerwise proxy whose prefill and decode are one server of kv_both, both requests wait until
        # receive_wait_s for chunks that nobody sends.
        servers = Played()
        scheduler = self.scheduler(servers)
        decoded = request(700, dict(ASKED))
        scheduler.arrived(decoded)
        if first == "left":
            scheduler.finished(decoded)
        spec = {"req_id": "layerwise a", "receiver_host": "h", "receiver_init_port": [1], "receiver_alloc_port": [2]}
        prefilled = request(700, {"do_remote_decode": True, "do_remote_prefill": False, "disagg_spec": spec}, "b")
        scheduler.arrived(prefilled)
        # It is computed at once.
        assert scheduler.matched(prefilled, 0) == (0, False)
        scheduler.allocated(prefilled, [1, 2, 3, 4, 5, 6], 0)
        assert [name for name, _ in scheduler.build(output()).announced] == ["a"]
        if first == "left":
            scheduler.finished(prefilled)
            return
        assert scheduler.matched(decoded, 0) == (None, False)
        scheduler.finished(prefilled)
        servers.what.ended = time.monotonic()
        with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
            # By now the engine's own cache has it.
            assert scheduler.matched(decoded, 640) == (0, False)
        assert caplog.records == []
        assert scheduler.build(output()).dropped == ["a"]

    def test_a_client_that_leaves_is_told_to_prefill(self) -> None:
        # Broken in production: clients that leave fill the receiver's slots.
        scheduler = self.scheduler(Played())
        one = request(700, dict(ASKED))
        scheduler.arrived(one)
        scheduler.build(output())
        scheduler.finished(one)
        assert scheduler.pending() and scheduler.build(output()).dropped == ["a"]
