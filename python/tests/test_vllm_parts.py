"""The connector's plain parts: options, keys, layout, what routers say. No vLLM is needed for these."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pd_backend.vllm.halves import is_sent, own_hosts
from pd_backend.vllm.keys import Context, Item, chunk_hashes, chunk_key
from pd_backend.vllm.layout import EngineLayout, LayoutMismatch
from pd_backend.vllm.options import OptionError, Options
from pd_backend.vllm.plugin import register
from pd_backend.vllm.spec import (
    DisaggSpec,
    Rendezvous,
    SpecError,
    decode_req_id,
    own_name,
    parked_answer,
    prefill_spec,
    remote_spec,
    turn_spec,
)

SPEC = {
    "req_id": "r", "receiver_host": "127.0.0.1", "receiver_init_port": [7300, 7301], "receiver_alloc_port": [7400, 7401]
}


class TestKeys:
    def test_both_engines_compute_the_same(self) -> None:
        # Broken in production: an upgrade of one end changes the keys, and nothing that the other end sends is found.
        assert chunk_hashes([1, 2, 3, 4, 5], 4) == [
            "c0f59ca40332ca3f9cce01b51c058d3a", "70dc302950c3a1398b53ce40be521aaf"
        ]
        assert chunk_hashes([1, 2, 3, 4, 5], 4, Context("l", "s", (Item(4, "i"),))) == [
            "d09779a0a57a052a2eba616aa8d64651", "61a3aa51b926476a26e79af0272b6477"
        ]

    def test_shared_beginnings_have_equal_keys(self) -> None:
        # Broken in production: a system prompt that a thousand requests share is sent a thousand times.
        one, other = chunk_hashes(list(range(600)), 256), chunk_hashes([*range(512), *range(88)], 256)
        assert one[:2] == other[:2] and one[2] != other[2] and len(one) == 3

    def test_a_chunk_depends_on_everything_before_it(self) -> None:
        # Broken in production: the same paragraph after two different ones is taken for the same KV.
        one, other = chunk_hashes([1] + [7] * 511, 256), chunk_hashes([2] + [7] * 511, 256)
        assert one[1] != other[1]

    def test_the_length_of_a_short_chunk_counts(self) -> None:
        # Broken in production: blocks of 100 tokens are taken for blocks of 101, whose last token was never computed.
        assert chunk_hashes([7] * 100, 256) != chunk_hashes([7] * 101, 256)[:1]
        assert chunk_hashes([0], 256) != chunk_hashes([0, 0], 256)
        assert chunk_hashes([7] * 512, 256)[0] != chunk_hashes([7] * 512, 512)[0]

    @pytest.mark.parametrize(
        "context",
        [
            Context(adapter="a"),
            Context(salt="a"),
            Context(items=(Item(3, "image"),)),
            Context(items=(Item(4, "image"),)),
            Context(items=(Item(3, "other image"),)),
        ],
    )
    def test_what_changes_kv_changes_the_key(self, context: Context) -> None:
        # Broken in production: a request with a LoRA, another tenant's salt or another image is answered with others'
        # KV.
        seen = {tuple(chunk_hashes([5] * 300, 256, other)) for other in (Context(), context)}
        assert len(seen) == 2
        assert chunk_hashes([5] * 300, 256, context)[1] != chunk_hashes([5] * 300, 256)[1]

    def test_lora_and_salt_are_not_confused(self) -> None:
        # Broken in production: a tenant chooses a salt that makes its keys those of another's LoRA.
        assert chunk_hashes([5], 4, Context(adapter="ab")) != chunk_hashes([5], 4, Context(adapter="a", salt="b"))

    def test_a_later_image_leaves_earlier_chunks_alone(self) -> None:
        # Broken in production: an image at the end of a prompt makes the whole of it new.
        one = chunk_hashes([5] * 600, 256, Context(items=(Item(300, "image"),)))
        assert one[0] == chunk_hashes([5] * 600, 256)[0] and one[1] != chunk_hashes([5] * 600, 256)[1]

    def test_keys_are_such_as_lmcache_reads(self) -> None:
        # Broken in production: a synchronous LMCache receiver stops answering for good at the first key.
        for tokens in range(1, 300):
            (name,) = chunk_hashes([tokens], 256)
            assert name == format(int(name, 16), "x")
            key = chunk_key("m/n", 2, 1, "w", name, "bfloat16").split("@")
            assert key[3] == format(int(key[3], 16), "x")
        assert chunk_key("m/n", 2, 1, "w", "9b41", "bfloat16") == "m/n@2@1@7c3ec6b8ba48db0ec77bbb08536e539f@bfloat16"


class TestLayout:
    def test_a_chunk_is_whole_blocks_of_all_layers(self) -> None:
        # Broken in production: slots of another length than what the connector copies.
        layout = EngineLayout("m", 256, 128, 131072, 8, engine={"vllm": "0.32.0"})
        assert (layout.chunk_blocks, layout.chunk_bytes) == (2, 8 * 2 * 131072)
        assert layout.json() == {
            "model": "m", "chunk_bytes": 2097152, "chunk_tokens": 256, "tp_rank": 0, "tp_size": 1,
            "engine": {"block_tokens": "128", "block_bytes": "131072", "layers": "8", "vllm": "0.32.0"},
        }

    def test_the_last_chunk_ends_with_its_block(self) -> None:
        # Broken in production: the daemons reserve too little for a short last chunk, and its last block is cut off.
        layout = EngineLayout("m", 256, 128, 1024, 2)
        tokens = {1: 128, 128: 128, 129: 256, 256: 256, 257: 128, 300: 128, 400: 256, 512: 256}
        assert {t: layout.last_chunk_tokens(t) for t in tokens} == tokens

    def test_chunks_that_blocks_do_not_fit_into_are_refused(self) -> None:
        # Broken in production: an engine with blocks of 96 tokens splits a block over two chunks.
        with pytest.raises(LayoutMismatch, match="set chunk_size to 288, at both ends"):
            EngineLayout("m", 256, 96, 1024, 2)
        with pytest.raises(LayoutMismatch, match="no whole number of bytes"):
            EngineLayout("m", 256, 128, 100, 3)


class TestSpec:
    def test_each_rank_has_its_receiver(self) -> None:
        # Broken in production: rank 1 sends to the receiver of rank 0.
        spec = prefill_spec({"disagg_spec": SPEC}, 2)
        assert spec == DisaggSpec("r", "127.0.0.1", (7300, 7301), (7400, 7401))
        assert (spec.receiver(1).init_port, spec.receiver(1).alloc_port) == (7301, 7401)

    def test_requests_that_stay_here_have_none(self) -> None:
        # Broken in production: an ordinary request to a prefill server is an error.
        assert prefill_spec(None, 1) is prefill_spec({}, 1) is prefill_spec({"ret_first_tok": True}, 1) is None
        assert decode_req_id(None) is decode_req_id({"do_remote_prefill": True}) is None
        assert decode_req_id({"disagg_spec": {"req_id": "r"}}) == "r"

    @pytest.mark.parametrize("ports", [[7301], [7300, 7302], 7300, None, "7300", [[7300, 7301]]])
    def test_what_goes_to_another_engines_receivers_is_not_waited_for(self, ports: object) -> None:
        # Broken in production: a request that vLLM gives to another data-parallel rank than the router meant waits for
        # chunks that never come.
        spec = {"req_id": "r", "receiver_init_port": [7300, 7301]}
        assert decode_req_id({"disagg_spec": spec}, [7300, 7301]) == decode_req_id({"disagg_spec": spec}, [7300]) == "r"
        with pytest.raises(SpecError, match=r"this data-parallel rank has \[7300, 7301\]: ask the rank whose receivers"):
            decode_req_id({"disagg_spec": spec | {"receiver_init_port": ports}}, [7300, 7301])
        with pytest.raises(SpecError, match="receiver_init_port = None"):
            decode_req_id({"disagg_spec": {"req_id": "r"}}, [7300])

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"req_id": ""}, "req_id = ''; expected a text"),
            ({"req_id": 7}, "req_id = 7"),
            ({"receiver_host": None}, "receiver_host = None"),
            ({"receiver_init_port": [7300]}, "receiver_init_port = [7300]; expected 2 ports"),
            ({"receiver_alloc_port": ["a", "b"]}, "receiver_alloc_port"),
            ({"receiver_alloc_port": [0, 1]}, "receiver_alloc_port"),
            ({"req_id": "\ud800"}, "req_id = '\\ud800'; expected a text"),
            ({"receiver_host": "a\udfff"}, "receiver_host = 'a\\udfff'; expected a host"),
            ({"receiver_host": "h" * 256}, "expected a host name or address, of 1 to 255 bytes"),
        ],
    )
    def test_a_spec_that_cannot_be_followed_says_why(self, change: dict[str, object], text: str) -> None:
        # Broken in production: a router's mistake ends the engine, or sends KV to a wrong port.
        with pytest.raises(SpecError) as refused:
            prefill_spec({"disagg_spec": SPEC | change}, 2)
        assert text in str(refused.value)
        with pytest.raises(SpecError, match="expected a map"):
            prefill_spec({"disagg_spec": "r"}, 2)

    @pytest.mark.parametrize(
        "spec",
        [
            "r" * 1_000_000,
            ["r"] * 1_000_000,
            SPEC | {"req_id": "r" * 1_000_000},
            SPEC | {"receiver_host": "h" * 1_000_000},
            SPEC | {"receiver_init_port": [0] * 1_000_000},
        ],
        ids=["text", "list", "req_id", "host", "ports"],
    )
    def test_a_mistake_of_a_megabyte_is_told_in_a_line(self, spec: object) -> None:
        # Broken in production: one client's request writes megabytes into the engine's log, and into its own answer.
        with pytest.raises(SpecError) as refused:
            prefill_spec({"disagg_spec": spec}, 1)
        assert len(str(refused.value)) < 300


class TestRemote:
    @pytest.mark.parametrize("change", [{"remote_port": "9" * 5000}, {"remote_engine_id": f"pd1:e:{'9' * 5000}", "remote_port": None}])
    def test_a_port_of_thousands_of_digits_is_a_mistake_like_others(self, change: dict[str, object]) -> None:
        # Broken in production: a client ends the engine, because Python reads no number that long.
        with pytest.raises(SpecError, match="remote_port"):
            remote_spec({"do_remote_prefill": True, "remote_host": "h"} | change, 1)

    def test_no_two_requests_have_one_name_however_long_the_engines_ids_are(self) -> None:
        # Broken in production: a client's long id, shared by the prompts of a list, has one request take the other's place.
        ids = [f"cmpl-{'x' * 300}-{index}-1a2b3c4d" for index in range(2)]
        for kind in ("parked", "kept"):
            names = [own_name(kind, request_id) for request_id in (*ids, "a")]
            assert len(set(names)) == 3 and all(len(name.encode()) <= 256 for name in names)
            assert names[2] == f"{kind} a"


class TestHalves:
    @pytest.mark.parametrize(
        ("params", "sent"),
        [
            (None, False), ({}, False), ({"ret_first_tok": True}, False),
            ({"do_remote_decode": True, "do_remote_prefill": False}, True),
            ({"do_remote_decode": False, "do_remote_prefill": True}, False),
            # The same words to both servers: who is named in them is the one that decodes.
            ({"disagg_spec": SPEC}, True),
            ({"disagg_spec": SPEC | {"receiver_host": "10.0.0.1"}}, False),
            ({"disagg_spec": SPEC | {"receiver_host": "10.0.0.1", "receiver_init_port": [7300, 7302]}}, True),
            ({"disagg_spec": SPEC | {"receiver_host": "10.0.0.1", "receiver_init_port": 7300}}, True),
            ({"disagg_spec": {"req_id": "r"}}, False), ({"disagg_spec": {"req_id": "r", "receiver_host": None}}, False),
            # What a client may write there.
            ({"disagg_spec": "r"}, False), ({"disagg_spec": []}, False), ({"disagg_spec": SPEC | {"receiver_host": []}}, True),
            ({"disagg_spec": SPEC | {"receiver_host": "10.0.0.1", "receiver_init_port": {}}}, True),
        ],
    )
    def test_a_server_of_both_halves_knows_which_one_is_asked(self, params: Any, sent: bool) -> None:
        # Broken in production: decode sends a request to itself, or prefill waits for chunks that it is to send.
        assert is_sent(params, {"10.0.0.1", "decode-1"}, [7300, 7301]) is sent

    def test_what_is_for_another_engine_of_this_server_is_not_prefilled(self) -> None:
        # Broken in production: a decode request of LMCache's dialect that comes to the wrong data-parallel rank is sent to the rank that
        # it names, where nobody waits for it, and its log says nothing.
        ours = {"disagg_spec": SPEC | {"receiver_host": "10.0.0.1", "receiver_init_port": [7302, 7303]}}
        hosts, ports = {"10.0.0.1"}, [7300, 7301]
        assert not is_sent(ours, hosts, ports, max_tokens=100)
        # It is to be prefilled: for another server of this machine, or for that rank.
        assert is_sent(ours, hosts, ports, max_tokens=1)
        assert is_sent(ours | {"do_remote_decode": True}, hosts, ports, max_tokens=100)
        assert is_sent({"disagg_spec": SPEC}, hosts, ports, max_tokens=100)
        # A server of one engine knows its ports.
        assert is_sent(ours, hosts, ports)

    def test_a_machine_knows_its_names(self) -> None:
        # Broken in production: decode does not see that it is the receiver that is named.
        pytest.importorskip("psutil")
        assert {"127.0.0.1", "localhost", "decode-1"} <= own_hosts(["decode-1", None, ""])
        options = Options.parse({"rendezvous_host": "a", "set": {"pd_peer_host": "'b'", "pd_advertise_host": "c"}})
        assert options.own_hosts() == ["a", "b", "c"]


class TestTurns:
    def test_a_router_may_say_where_the_turn_before_was_decoded(self) -> None:
        # Broken in production: a multi-turn router's parameters are not followed, or end the engine.
        said = parked_answer("cmpl-1", Rendezvous("10.0.0.2", (5600, 5601), "me", "pull"), [1], 512)
        swapped = said | {"do_remote_decode": True, "do_remote_prefill": False}
        spec = turn_spec(swapped, 2)
        assert spec is not None and (spec.host, spec.ports, spec.ids) == ("10.0.0.2", (5600, 5601), ("cmpl-1",))
        assert turn_spec(said, 2) is turn_spec(None, 2) is turn_spec({"do_remote_decode": True}, 2) is None
        for change in ({"remote_host": None}, {"remote_host": 7}, {"tp_size": 1}):
            assert turn_spec(swapped | change, 2) is None
        assert turn_spec({"do_remote_decode": True, "remote_host": "h", "remote_port": "x"}, 2) is None


class TestOptions:
    def test_nothing_given_is_fine(self) -> None:
        # Broken in production: the shortest configuration is refused.
        assert Options.parse(None) == Options.parse({}) == Options()
        assert Options().daemon_args("cpu") == ["--set", "pd_buffer_device=cpu"]

    @pytest.mark.parametrize(
        ("given", "bound", "told"),
        [
            ({}, "127.0.0.1", "127.0.0.1"),
            ({"rendezvous_host": "10.0.0.1"}, "10.0.0.1", "10.0.0.1"),
            ({"set": {"pd_rendezvous_host": "10.0.0.1"}}, None, "10.0.0.1"),
            ({"rendezvous_host": "10.0.0.1", "set": {"pd_rendezvous_host": "0.0.0.0"}}, None, "10.0.0.1"),
        ],
    )
    def test_decode_is_told_where_the_rendezvous_port_is_bound_or_what_the_option_says(self, given, bound, told):
        options = Options.parse(given)
        assert options.advertised_host() == told
        # What `set` says is not said twice.
        assert (f"pd_rendezvous_host={bound}" in options.rendezvous_args()) == (bound is not None)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "*"])
    @pytest.mark.parametrize("by", ["option", "set"])
    def test_decode_is_never_told_an_address_that_stands_for_every_address(self, host, by):
        given = {"rendezvous_host": host} if by == "option" else {"set": {"pd_rendezvous_host": host}}
        with pytest.raises(OptionError, match="which decode servers are told"):
            Options.parse(given).rendezvous_args()

    def test_sets_are_written_as_yaml(self) -> None:
        # Broken in production: a list of ports or a boolean arrives at the daemon as Python writes it.
        given = {"pd_peer_init_port": [7300, 7301], "pd_skip_proxy_notification": True, "a": 1.5}
        options = Options.parse({"set": given})
        assert options.daemon_args("cpu")[2:] == [
            "--set", "pd_peer_init_port=[7300, 7301]", "--set", "pd_skip_proxy_notification=true", "--set", "a=1.5",
        ]
        assert Options.parse({"set": ["a=b=c"]}).set == (("a", "b=c"),)

    def test_the_buffer_is_where_the_kv_is_unless_said_otherwise(self, tmp_path: Path) -> None:
        # Broken in production: KV on a GPU meets a buffer in host memory, or a configured device is overruled.
        assert Options().daemon_args("cuda:1") == ["--set", "pd_buffer_device=cuda:1"]
        options = Options.parse({"set": {"pd_buffer_device": "cuda:0"}})
        assert options.daemon_args("cuda:1") == ["--set", "pd_buffer_device=cuda:0"]
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "c.yaml"
        file.write_text("pd_buffer_device: cuda\n")
        assert Options.parse({"config_file": str(file)}).daemon_args("cuda:1") == ["--config", str(file)]

    def test_a_daemon_of_kv_both_has_both_halves_and_free_ports(self) -> None:
        # Broken in production: a server that does both starts a daemon that only sends, or none without ports.
        both = ["--set", "pd_buffer_device=cpu", "--set", "pd_role=both"]
        free = ["--set", "pd_peer_init_port=0", "--set", "pd_peer_alloc_port=0"]
        assert Options().daemon_args("cpu", both=True) == both + free
        given = Options.parse({"set": {"pd_role": "both", "nixl_peer_init_port": 7300, "pd_peer_alloc_port": 7400}})
        assert given.daemon_args("cpu", both=True)[2:] == [
            "--set", "pd_role=both", "--set", "nixl_peer_init_port=7300", "--set", "pd_peer_alloc_port=7400"
        ]
        with pytest.raises(OptionError, match="pd_role = sender; with kv_role = kv_both the daemon has both halves"):
            Options.parse({"set": {"pd_role": "sender"}}).daemon_args("cpu", both=True)

    def test_a_daemon_with_both_halves_is_refused_where_one_is_used(self, tmp_path: Path) -> None:
        # Broken in production: a file that prefill and decode share gives half of each buffer to a direction that nobody uses.
        roles = ({"pd_role": "both"}, {"nixl_role": "both"}, {"pd_role": "sender", "nixl_role": "both"})
        spelt = ({"pd_role": "both "}, {" pd_role": "'both'"}, ["pd_role = both"], ['pd_role="both" '])
        for given in (*roles, *spelt):
            with pytest.raises(OptionError, match="leave pd_role out"):
                Options.parse({"set": given}).daemon_args("cpu")
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "c.yaml"
        for line in ("pd_role: both", "nixl_role: both"):
            file.write_text(f"{line}\n")
            with pytest.raises(OptionError, match="pd_role = both; with kv_producer and kv_consumer the daemon has one half"):
                Options.parse({"config_file": str(file)}).daemon_args("cpu")
            taken_back = Options.parse({"config_file": str(file), "set": {"pd_role": None}}).daemon_args("cpu")
            assert taken_back[-2:] == ["--set", "pd_role="]
        file.write_text("pd_role: sender\n")
        assert Options.parse({"config_file": str(file)}).daemon_args("cpu")[:2] == ["--config", str(file)]

    def test_daemons_get_the_time_that_they_were_given(self) -> None:
        # Broken in production: a request that may wait for ten minutes is given up by its client after two.
        assert Options().wait_timeout_s() == 86400.0
        slots = {"pd_allocation_timeout_sec": 30}
        assert Options.parse({"set": slots}).wait_timeout_s() == 3600.0
        assert Options.parse({"set": slots | {"pd_wait_timeout_sec": 7200}}).wait_timeout_s() == 7200.0
        assert Options.parse({"set": slots | {"pd_wait_timeout_sec": 5}}).wait_timeout_s() == 30.0
        assert Options.parse({"set": {"pd_allocation_timeout_sec": "inf"}}).wait_timeout_s() == 86400.0
        assert Options.parse({"set": slots | {"pd_wait_timeout_sec": "soon"}}).wait_timeout_s() == 30.0

    def test_the_chunk_size_is_the_daemons(self, tmp_path: Path) -> None:
        # Broken in production: the connector cuts chunks of another length than the daemon was configured for.
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "c.yaml"
        file.write_text("chunk_size: 512\nmodel_name: n\n")
        assert Options.parse({"config_file": str(file)}).chunk_tokens() == 512
        assert Options.parse({"config_file": str(file), "set": {"chunk_size": 128}}).chunk_tokens() == 128
        assert Options.parse({"config_file": str(file)}).model("engine's") == "n"
        with pytest.raises(OptionError, match="cannot be read"):
            Options.parse({"config_file": str(tmp_path / "none")}).chunk_tokens()
        file.write_bytes(b"chunk_size: \xff")
        with pytest.raises(OptionError, match="c.yaml cannot be read"):
            Options.parse({"config_file": str(file)}).chunk_tokens()

    def test_the_file_is_read_once(self, tmp_path: Path) -> None:
        # Broken in production: somebody edits the file for the next start, and the running engine ends.
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "sender.yaml"
        file.write_text("pd_rendezvous_host: 10.0.0.1\n")
        options = Options.parse({"config_file": str(file)})
        assert options.advertised_host() == "10.0.0.1"
        file.write_text("pd_rendezvous_host: [\n")
        assert options.advertised_host() == "10.0.0.1"

    def test_without_a_file_options_count(self) -> None:
        # Broken in production: chunk_size and model_name of the option are ignored.
        options = Options.parse({"chunk_size": 512, "model_name": "n"})
        assert (options.chunk_tokens(), options.model("engine's")) == (512, "n")
        assert (Options().chunk_tokens(), Options().model("engine's")) == (256, "engine's")

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"chunk_sise": 1}, "`chunk_sise` is not an option of kv_connector_extra_config; did you mean `chunk_si"),
            ({"chunk_size": 0}, "chunk_size = 0; expected a whole number from 1 up"),
            ({"chunk_size": True}, "chunk_size = True"),
            ({"restarts_max": -1}, "restarts_max = -1; expected a whole number from 0 up"),
            ({"ready_timeout_s": "soon"}, "ready_timeout_s = 'soon'; expected seconds"),
            ({"slot_wait_s": 0}, "slot_wait_s = 0; expected seconds"),
            ({"lookup": "yes"}, "lookup = 'yes'; expected true or false"),
            ({"binary_dir": 7}, "binary_dir = 7; expected text"),
            ({"set": "a=b"}, "set = 'a=b'; expected a map of keys"),
        ],
    )
    def test_a_mistake_is_named(self, given: dict[str, object], text: str) -> None:
        # Broken in production: a misspelt option is ignored, and the operator believes that it holds.
        with pytest.raises(OptionError) as refused:
            Options.parse(given)
        assert text in str(refused.value)


def test_vllm_may_load_the_plugin_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: a process that loads plugins a second time does not start.
    known: dict[str, tuple[str, str]] = {}

    class KVConnectorFactory:
        """Refuses a name that it knows, as vLLM's does."""

        @staticmethod
        def register_connector(name: str, module_path: str, class_name: str) -> None:
            if name in known:
                raise ValueError(f"Connector '{name}' is already registered.")
            known[name] = (module_path, class_name)

    factory = ModuleType("vllm.distributed.kv_transfer.kv_connector.factory")
    factory.KVConnectorFactory = KVConnectorFactory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, factory.__name__, factory)
    for parent in ("vllm", "vllm.distributed", "vllm.distributed.kv_transfer", "vllm.distributed.kv_transfer.kv_connector"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    register()
    register()
    assert known == {"PdConnector": ("pd_backend.vllm.connector", "PdConnector")}
