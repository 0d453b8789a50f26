"""What a LoRA adapter is: a digest of its files, on which two servers agree if they have loaded the same bytes.

The scheduler's process reads the files, and the worker has loaded them, perhaps long before. So the worker notes what
it has loaded by what the file system says of the files, and sends and loads nothing for an adapter whose files have
changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG = "adapter_config.json"
#: The first of these that is there has the weights, as vLLM looks for them.
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files are now."""

    #: vLLM's number for it, in this server.
    lora_id: int
    #: Changes with every write to its files, and with every file that takes another's place. Of this machine.
    signature: str
    #: What it is: the same on every machine.
    digest: str


def signature(folder: Path) -> str:
    """Raises `OSError` where a file is missing or cannot be asked after."""
    facts = []
    for file in _files(folder):
        stat = file.stat()
        facts.append((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return repr(facts)


class Adapters:
    """Reads adapters for the scheduler, each once until it changes."""

    def __init__(self, folder_of: Callable[[str], str]) -> None:
        """`folder_of`: where the files of a `lora_path` are."""
        self._folder_of = folder_of
        self._read: dict[str, tuple[str, str]] = {}

    def of(self, lora_request: Any) -> Adapter:
        """Raises `OSError` where its files cannot be read, or change meanwhile."""
        path = lora_request.lora_path
        folder = Path(self._folder_of(path))
        now = signature(folder)
        if self._read.get(path, ("",))[0] != now:
            digest = _digest(folder)
            if signature(folder) != now:
                raise OSError(f"the files in {folder} change while they are read")
            self._read[path] = now, digest
        layout = "3d" if getattr(lora_request, "is_3d_lora_weight", False) else ""
        return Adapter(lora_request.lora_int_id, now, self._read[path][1] + layout)


class LoadedAdapters:
    """What a worker has loaded: the signature of an adapter's files when it was."""

    def __init__(self) -> None:
        self._signatures: dict[int, str] = {}
        self._news: dict[int, str] = {}

    def load(self, lora_id: int, folder_of: Callable[[], str], load: Callable[[], Any]) -> Any:
        """Runs `load`, which reads the adapter's files, and notes which they were."""
        before = _signature_or_none(folder_of)
        loaded = load()
        after = _signature_or_none(folder_of)
        # Files that were not there before were fetched for this.
        known = after if before in (None, after) else None
        self._signatures[lora_id] = self._news[lora_id] = known or ""
        return loaded

    def may_be(self, adapter: Adapter | None) -> bool:
        """Whether what is loaded under the adapter's number can be this one; what is not loaded yet can."""
        return adapter is None or self._signatures.get(adapter.lora_id, adapter.signature) == adapter.signature

    def news(self) -> dict[int, str]:
        """Signatures of those that were loaded since the last call, by number."""
        news, self._news = self._news, {}
        return news


def _signature_or_none(folder_of: Callable[[], str]) -> str | None:
    try:
        return signature(Path(folder_of()))
    except OSError:
        return None


def _files(folder: Path) -> list[Path]:
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), folder / _WEIGHTS[0])
    return [folder / _CONFIG, weights]


def _digest(folder: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    for file in _files(folder):
        state.update(f"{file.suffix} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                state.update(piece)
    return state.hexdigest()
