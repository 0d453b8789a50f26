"""What a checkpoint is: a digest of its configuration and of its weights' files, wherever they lie.

Two servers must agree on it before one uses the other's KV. It is taken of the files, and not of what an engine has made
of them, because prefill and decode may hold the same weights in other layouts. A checkpoint of up to a gibibyte is read
whole. Of a larger one every tensor is sampled: pieces of 4 KiB, evenly apart, and small tensors (norms, KV scales) whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger("vllm.pd_backend")

#: Tried in this order, as vLLM does.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_WHOLE_BYTES_MAX = 1 << 30
_PIECE_BYTES = 4096
#: A process's start is known to a second.
_CLOCK_S = 2.0
#: Together, of a checkpoint that is sampled, where it has no more than half as many tensors: 128 MiB.
_PIECES_MAX = 1 << 15
_NOT_COMPARED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_HEADER_BYTES_MAX = 1 << 27


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights; a checkpoint may be one file."""
    if folder.is_file():
        return [folder]
    for pattern in _PATTERNS:
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if files:
            return files
    return []


def weights_digest(files: Iterable[Path], whole_bytes_max: int = _WHOLE_BYTES_MAX) -> str:
    """The same for the same tensors, however they are spread over files. Raises `OSError`."""
    tensors = sorted(tensor for file in files for tensor in _tensors(file))
    whole = sum(length for *_, length in tensors) <= whole_bytes_max
    pieces = 1 << 62 if whole else max(2, _PIECES_MAX // max(1, len(tensors)))
    state = hashlib.blake2b(digest_size=16)
    opened: dict[str, BinaryIO] = {}
    try:
        for name, kind, path, begin, length in tensors:
            state.update(f"{name}\0{kind}\0{length}\0".encode())
            if path not in opened:
                opened[path] = open(path, "rb")
            for offset, count in _pieces(length, pieces):
                opened[path].seek(begin + offset)
                state.update(opened[path].read(count))
    finally:
        for file in opened.values():
            file.close()
    return state.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """Of a model's configuration, without what says where it came from, and the dtype, which is compared by itself."""
    said = {key: value for key, value in config.items() if key not in _NOT_COMPARED}
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def combined(*parts: str) -> str:
    """One digest of several."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _tensors(file: Path) -> list[tuple[str, str, str, int, int]]:
    """`(name, dtype and shape, path, first byte, bytes)`; a file that is not cut into tensors is one."""
    size = file.stat().st_size
    whole = [(file.name, "", str(file), 0, size)]
    if file.suffix != ".safetensors":
        return whole
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        if not 0 < header_bytes <= min(size, _HEADER_BYTES_MAX):
            return whole
        begin = 8 + header_bytes
        try:
            return [
                (name, f"{tensor['dtype']} {tensor['shape']}", str(file), begin + first, end - first)
                for name, tensor in json.loads(opened.read(header_bytes)).items()
                if name != "__metadata__"
                for first, end in [tensor["data_offsets"]]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            return whole  # It has the name of such a file.


def _pieces(length: int, pieces_max: int) -> Iterator[tuple[int, int]]:
    """`(offset, bytes)` of what is read of so many bytes: all of it, if that takes no more pieces."""
    if length <= pieces_max * _PIECE_BYTES:
        step = 1 << 20
        yield from ((offset, min(step, length - offset)) for offset in range(0, length, step))
        return
    for index in range(pieces_max):
        yield (length - _PIECE_BYTES) * index // (pieces_max - 1), _PIECE_BYTES


def identity(vllm_config: Any, started_s: float) -> str:
    """What the model is that a server loads at its start, in seconds of the clock.

    Raises `OSError` where files cannot be read, and `ValueError` where they have changed since the start, so that it is
    not known which were loaded.
    """
    model = vllm_config.model_config
    parts = [config_digest(_configuration(model))]
    drafting = getattr(vllm_config.speculative_config, "draft_model_config", None)
    for loaded in (model, drafting):
        if loaded is None:
            continue
        folder = None if vllm_config.load_config.load_format == "dummy" else _folder(loaded, vllm_config.load_config)
        files = [] if folder is None else weight_files(folder)
        if files:
            if Path(loaded.model).exists():  # Nothing that this server has fetched itself.
                _check_unchanged(files, started_s)
            parts.append(weights_digest(files))
        else:
            load_format = str(vllm_config.load_config.load_format)
            parts.append(load_format if load_format == "dummy" else f"{load_format} {loaded.model} {loaded.revision}")
            if load_format != "dummy":
                logger.warning(
                    "the weights of %s are known by that name alone: no files of them are found here; where one name has "
                    "had several weights, set weights_id", loaded.model,
                )
    return combined(*parts)


def _configuration(model: Any) -> dict[str, Any]:
    """What of a model's configuration its KV depends on."""
    config = model.hf_config.to_dict()
    multimodal = getattr(model, "multimodal_config", None)
    for option in ("mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate"):
        config[f"vllm {option}"] = getattr(multimodal, option, None)
    if "longrope" in json.dumps(config, default=str):
        # vLLM chooses its factors by this.
        config["vllm max_model_len"] = model.max_model_len
    return config


def _folder(model: Any, load_config: Any) -> Path | None:
    """Where a model's files are: its own folder, or what was fetched of it."""
    path = Path(model.model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        fetched = snapshot_download(
            model.model, revision=model.revision, cache_dir=load_config.download_dir, local_files_only=True
        )
    except Exception:  # It has many, and none of them is this server's business: vLLM has loaded the model.
        return None
    return Path(fetched)


def _check_unchanged(files: Iterable[Path], started_s: float) -> None:
    for file in files:
        if file.stat().st_ctime > started_s + _CLOCK_S:
            raise ValueError(
                f"{file} has changed since this server was started, so that it is not known what was loaded; start it "
                "again, or set weights_id"
            )
