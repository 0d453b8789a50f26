"""What a checkpoint is called: the same wherever its tensors lie, another when anything in it is another."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from pd_backend.vllm.checkpoint import config_digest, identity, weight_files, weights_digest

TENSORS = {"norm": bytes(range(64)), "k_scale": b"\0\0\x80\x3f", "proj": bytes(i * 7 % 251 for i in range(100_000))}


def save(file: Path, tensors: dict[str, bytes], note: str = "") -> Path:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"note": note}}
    begin = 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [begin, begin + len(content)]}
        begin += len(content)
    text = json.dumps(header).encode()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    return file


def changed(name: str, at: int) -> dict[str, bytes]:
    content = bytearray(TENSORS[name])
    content[at] ^= 1
    return TENSORS | {name: bytes(content)}


def config(folder: Path, load_format: str = "auto", **more: Any) -> Any:
    model = Fake(
        model=str(folder),
        revision=None,
        max_model_len=4096,
        multimodal_config=None,
        hf_config=Fake(to_dict=lambda: {"_name_or_path": str(folder), "rope_theta": 1e4} | more),
    )
    return Fake(
        model_config=model, speculative_config=None, load_config=Fake(load_format=load_format, download_dir=None)
    )


@pytest.mark.parametrize("whole_bytes_max", [1 << 30, 0], ids=["read whole", "sampled"])
def test_the_same_tensors_have_one_name(tmp_path: Path, whole_bytes_max: int) -> None:
    # Broken in production: two servers that load one checkpoint from two places, or in other shards, refuse each other.
    one = weights_digest([save(tmp_path / "a" / "model.safetensors", TENSORS)], whole_bytes_max)
    (tmp_path / "b").mkdir()
    shards = [
        save(tmp_path / "b" / "model-2.safetensors", {"norm": TENSORS["norm"]}, "written elsewhere"),
        save(tmp_path / "b" / "model-1.safetensors", {name: TENSORS[name] for name in ("proj", "k_scale")}),
    ]
    assert weights_digest(shards, whole_bytes_max) == one
    for other in (
        changed("k_scale", 1), changed("norm", 63), changed("proj", 0), changed("proj", 99_999),
        {name: TENSORS[name] for name in ("norm", "proj")},
        {"other": TENSORS["norm"], "k_scale": TENSORS["k_scale"], "proj": TENSORS["proj"]},
    ):
        assert weights_digest([save(tmp_path / "c" / "model.safetensors", other)], whole_bytes_max) != one


def test_a_small_checkpoint_is_read_to_its_last_byte(tmp_path: Path) -> None:
    # Broken in production: a fine-tune that has touched one element starts as a pair with what it was made of.
    one = weights_digest([save(tmp_path / "a.safetensors", TENSORS)])
    for at in range(1000, 100_000, 9973):
        assert weights_digest([save(tmp_path / "b.safetensors", changed("proj", at))]) != one


def test_a_large_checkpoint_is_sampled_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: start-up reads hundreds of gigabytes; or a fine-tune of some layers goes unseen.
    monkeypatch.setattr("pd_backend.vllm.checkpoint._PIECES_MAX", 12)
    one = weights_digest([save(tmp_path / "a.safetensors", TENSORS)], 0)
    fine_tuned = TENSORS | {"proj": bytes(byte ^ 1 for byte in TENSORS["proj"])}
    assert weights_digest([save(tmp_path / "b.safetensors", fine_tuned)], 0) != one
    # Four pieces of it are read: what is between them is not.
    assert weights_digest([save(tmp_path / "c.safetensors", changed("proj", 20_000))], 0) == one


def test_a_servers_model(tmp_path: Path) -> None:
    # Broken in production: two checkpoints under one model_name start as a pair; or one under two paths do not.
    save(tmp_path / "a" / "model.safetensors", TENSORS)
    save(tmp_path / "b" / "model.safetensors", TENSORS)
    save(tmp_path / "c" / "model.safetensors", changed("k_scale", 0))
    later = time.time() + 60
    one = identity(config(tmp_path / "a"), later)
    assert identity(config(tmp_path / "b"), later) == one
    assert identity(config(tmp_path / "c"), later) != one
    assert identity(config(tmp_path / "a", rope_theta=5e5), later) != one
    drafting = config(tmp_path / "a")
    drafting.speculative_config = Fake(draft_model_config=config(tmp_path / "c").model_config)
    assert identity(drafting, later) != one
    # Random weights are vLLM's own, by the configuration; files that are not read do not count.
    dummy = identity(config(tmp_path / "a", "dummy"), later)
    assert dummy != one and identity(config(tmp_path / "c", "dummy"), later) == dummy
    # No files at all: the name counts, and another one is another.
    assert identity(config(tmp_path / "nowhere"), later) != identity(config(tmp_path / "elsewhere"), later)


def test_files_that_changed_while_they_were_loaded(tmp_path: Path) -> None:
    # Broken in production: a checkpoint is replaced while a server starts, which has the old weights and the new name.
    save(tmp_path / "a" / "model.safetensors", TENSORS)
    with pytest.raises(ValueError, match="has changed since this server was started"):
        identity(config(tmp_path / "a"), time.time() - 60)


def test_what_vllm_chooses_by_the_longest_sequence(tmp_path: Path) -> None:
    # Broken in production: two servers with other --max-model-len rotate the same keys by other factors.
    def of(max_model_len: int, kind: str) -> str:
        given = config(tmp_path, "dummy", rope_parameters={"rope_type": kind})
        given.model_config.max_model_len = max_model_len
        return identity(given, time.time())

    assert of(4096, "longrope") != of(131072, "longrope")
    assert of(4096, "yarn") == of(131072, "yarn")


def test_other_files_than_safetensors(tmp_path: Path) -> None:
    # Broken in production: a GGUF file or an old checkpoint of pickles has no name.
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    one = weights_digest(weight_files(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert weights_digest(weight_files(tmp_path)) != one
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert weight_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
    # What has the name of a file of tensors alone is read like any other.
    names = set()
    for garbage in (b"", b"\xff" * 100, (9).to_bytes(8, "little") + b'{"a": 1}x', (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "g.safetensors").write_bytes(garbage)
        names.add(weights_digest([tmp_path / "g.safetensors"]))
    assert len(names) == 4


def test_a_configuration_says_nothing_of_where_it_came_from() -> None:
    # Broken in production: the same configuration, written by another release of transformers, refuses the pair.
    known_otherwise = {"_name_or_path": "x", "transformers_version": "1", "torch_dtype": "float16", "dtype": "float16"}
    assert config_digest({"a": 1} | known_otherwise) == config_digest({"a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})
