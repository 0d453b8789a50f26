"""What `kv_connector_extra_config` may say."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .bootstrap import MOONCAKE_PORT
from .rank import Rank, port_args

#: Ports that a daemon binds, each with its older name.
_PORTS = (
    ("pd_peer_init_port", "nixl_peer_init_port"),
    ("pd_peer_alloc_port", "nixl_peer_alloc_port"),
    ("pd_peer_query_port",),
    ("pd_rendezvous_port",),
    ("pd_metrics_port",),
)
#: How long the daemons wait where nobody says otherwise.
_DAEMON_WAITS_S = {"pd_wait_timeout_sec": 3600.0, "pd_allocation_timeout_sec": 86400.0}
_SECONDS_MAX = 86400.0
#: These can be bound, and nobody can connect to them.
_EVERY_ADDRESS = ("0.0.0.0", "::", "[::]", "*")
_BOOTSTRAP_VARIABLE = "VLLM_MOONCAKE_BOOTSTRAP_PORT"


class OptionError(ValueError):
    """An option that cannot be used, by name."""


@dataclass(frozen=True)
class Options:
    """All of them have a default; docs/vllm.md explains them."""

    #: YAML of the daemon; one without a path has only what `set` says.
    config_file: str | None = None
    #: Keys over the file, as `--set` takes them.
    set: tuple[tuple[str, str], ...] = ()
    #: Where pd-sender and pd-receiver are; the package, PD_BIN_DIR and PATH otherwise.
    binary_dir: str | None = None
    #: What both ends call the model; the engine's own name of it otherwise.
    model_name: str | None = None
    #: What both ends call the weights; a digest of the checkpoint otherwise.
    weights_id: str | None = None
    #: Tokens of a chunk, where neither `set` nor the file says.
    chunk_size: int = 256
    #: How long a daemon may take to start, its buffer included.
    ready_timeout_s: float = 60.0
    #: How long a daemon may answer nothing, though it was asked whether it is there, before its requests fail.
    silence_timeout_s: float = 10.0
    #: A daemon that has ended is started again, so often within so long; after that its requests fail.
    restarts_max: int = 3
    restart_window_s: float = 60.0
    #: Prefill: how long a request waits for slots, at either end; the daemon's pd_allocation_timeout_sec otherwise.
    slot_wait_s: float | None = None
    #: Decode: how long a request waits for a sender that announces it; the daemon's pd_wait_timeout_sec otherwise.
    receive_wait_s: float | None = None
    #: Prefill: where decode servers ask for chunks of requests whose router names no receiver: a host name or address of this
    #: server, and the port of the first rank (the others take the next ones); 0 is any free port.
    rendezvous_host: str = ""
    rendezvous_port: int = 0
    #: Prefill: what routers are told: `pull`, to ask decode once prefill has answered, or `push`, to ask both at once from the
    #: second request on (those that know the word; the others ask one after the other).
    transfer_mode: str = "pull"
    #: Prefill: where routers of Mooncake's dialect, and the decode servers behind them, ask for the rendezvous ports. Decode: where
    #: prefill servers are asked of which a router names the host alone.
    bootstrap_port: int | None = None
    #: Prefill: how long such chunks are kept that nobody asks for.
    kv_lease_duration: float = 30.0
    #: Prefill: whether requests of one token whose router says nothing are pushed to the decode server that is likely to get
    #: them.
    unsolicited: bool = True
    #: Prefill: in how many parts the layers of a step are pushed while it is computed; 1 pushes after it.
    layer_pushes: int = 4
    #: Both parts: a prompt of which prefill lacks so many tokens is asked for at the servers that may have decoded the
    #: conversation's turn before, and decode keeps its chunks for that; 0: neither.
    kv_recompute_threshold: int = 256
    #: Both parts: whether decode's answers say where the KV of the conversation is, for routers that pass that on to prefill.
    bidirectional_kv_xfer: bool = False
    #: Decode: whether requests without a `disagg_spec` are looked up by their chunks.
    lookup: bool = True
    #: Both parts: what is compared as vLLM's version instead of its own, for two versions that are known to have the same KV.
    vllm_version: str | None = None
    #: Whether the daemon's log goes to the engine's standard error.
    daemon_log: bool = True

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None) -> Options:
        """Raises `OptionError` naming the option that is unknown or has another type than it should."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in (extra_config or {}).items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise OptionError(
                    f"`{name}` is not an option of kv_connector_extra_config{hint} "
                    f"(they are {', '.join(sorted(known))})"
                )
            if value is not None:
                values[name] = _parsed(name, value)
        return cls(**values)

    def chunk_tokens(self) -> int:
        """Tokens of a chunk, from where the daemon would take them: `set`, then the file, then the option."""
        for key, value in reversed(self.set):
            if key == "chunk_size" and value:
                return _count("set.chunk_size", value)
        from_file = self._yaml().get("chunk_size")
        return self.chunk_size if from_file is None else _count(f"chunk_size in {self.config_file}", from_file)

    def model(self, engine_name: str) -> str:
        """What both ends call the model: `set`, the file, the option, the engine's name."""
        for key, value in reversed(self.set):
            if key == "model_name" and value:
                return _unquoted(value)
        return str(self._yaml().get("model_name") or self.model_name or engine_name)

    def wait_timeout_s(self) -> float:
        """The longest that the daemon lets a request wait for slots or chunks: by its defaults, the file and `set`."""
        given = {**self._yaml(), **dict(self.set)}
        longest = 0.0
        for key, default in _DAEMON_WAITS_S.items():
            value = given.get(key)
            try:
                longest = max(longest, default if value in (None, "") else float(value))
            except (TypeError, ValueError):
                pass  # The daemon says what is wrong with it.
        return min(longest or max(_DAEMON_WAITS_S.values()), _SECONDS_MAX)

    def advertised_host(self) -> str:
        """Where decode is told to ask for parked chunks. What is bound may be another address, if `set` or the file says."""
        bound = {**self._yaml(), **dict(self.set)}.get("pd_rendezvous_host")
        host = self.rendezvous_host or str(bound or "127.0.0.1")
        if host in _EVERY_ADDRESS:
            raise OptionError(
                f"rendezvous_host = {host!r}, which decode servers are told; expected an address of this server that they "
                f"reach. To bind every address, put \"pd_rendezvous_host\": \"0.0.0.0\" into set"
            )
        return host

    def bootstrap(self, connector: str) -> int | None:
        """The bootstrap port: of the option, or of the variable that vLLM's own MooncakeConnector reads; None without either.
        `connector` is the name by which vLLM was told to load this one.
        """
        if self.bootstrap_port is not None:
            return self.bootstrap_port
        said = os.environ.get(_BOOTSTRAP_VARIABLE)
        if said is None:
            return MOONCAKE_PORT if connector == "MooncakeConnector" else None
        if not said.isascii() or not said.isdigit() or not 0 < int(said) < 65536:
            raise OptionError(f"{_BOOTSTRAP_VARIABLE} = {said!r}; expected a port")
        return int(said)

    def rendezvous_bind_host(self) -> str:
        """What is bound for decode servers that ask for parked chunks."""
        bound = {**self._yaml(), **dict(self.set)}.get("pd_rendezvous_host")
        return _unquoted(str(bound)) if bound else self.advertised_host()

    def receiver_host(self) -> str | None:
        """Where prefill is told that this server's receivers are; None where no such address is said."""
        given = {**self._yaml(), **dict(self.set)}
        hosts = (given.get(key) for key in ("pd_advertise_host", "pd_peer_host", "nixl_peer_host"))
        host = next((_unquoted(str(host)) for host in hosts if host), None)
        return None if host in _EVERY_ADDRESS else host

    def prefill_hosts(self) -> list[str] | None:
        """Which hosts decode may ask that a request names; None for any. The daemon says what is wrong with the list."""
        given = {**self._yaml(), **dict(self.set)}.get("pd_prefill_hosts")
        if given in (None, ""):
            return None
        if isinstance(given, str):  # As `set` has a list: in brackets.
            items = given[1:-1].split(",") if given[0] + given[-1] == "[]" else [given]
            return [_unquoted(item.strip()) for item in items if item.strip()]
        return [str(item) for item in given] if isinstance(given, list) else [str(given)]

    def rendezvous_args(self, rank: Rank = Rank()) -> list[str]:
        """What a pd-sender is started with for requests that are parked, unless the configuration says."""
        port = rank.port("rendezvous_port", [self.rendezvous_port])
        values = {
            "pd_rendezvous_host": ["--set", f"pd_rendezvous_host={self.advertised_host()}"],
            "pd_rendezvous_port": port_args("pd_rendezvous_port", port, rank.tensor),
            "pd_lease_sec": ["--set", f"pd_lease_sec={self.kv_lease_duration}"],
        }
        said = {*self._yaml(), *(key for key, _ in self.set)}
        return [arg for key, args in values.items() if key not in said for arg in args]

    def daemon_args(self, kv_device: str, rank: Rank = Rank(), *, both: bool = False) -> list[str]:
        """What the daemon of this rank is started with, besides its layout. `kv_device`: where the engine's KV is, which is
        where its buffer goes unless the configuration says. `both`: it has both halves, and any free ports unless the
        configuration says. Raises `OptionError` for a `pd_role` that contradicts, and `PortError` where the configuration has
        no port for this rank.
        """
        role = self._said("pd_role", "nixl_role")
        if both and role not in (None, "both"):
            raise OptionError(f"pd_role = {role}; with kv_role = kv_both the daemon has both halves: leave pd_role out")
        if role == "both" and not both:
            raise OptionError(
                "pd_role = both; with kv_producer and kv_consumer the daemon has one half: leave pd_role out of a "
                "configuration that prefill and decode share, or set kv_role to kv_both"
            )
        args = [] if self.config_file is None else ["--config", self.config_file]
        said = {*self._yaml(), *(key for key, _ in self.set)}
        if not said & {"pd_buffer_device", "nixl_buffer_device"}:
            args += ["--set", f"pd_buffer_device={kv_device}"]
        if both and role is None:
            args += ["--set", "pd_role=both"]
        for port in ("peer_init_port", "peer_alloc_port") if both else ():
            if not said & {f"pd_{port}", f"nixl_{port}"}:
                args += ["--set", f"pd_{port}=0"]
        for key, value in self.set:
            args += ["--set", f"{key}={value}"]
        return args + self._rank_args(kv_device, rank)

    def _rank_args(self, kv_device: str, rank: Rank) -> list[str]:
        """What the configuration says once for all ranks, as it is for this one."""
        args = ["--rank", str(rank.tensor)] if rank.tensor else []
        for names in _PORTS if rank.number else ():
            ports = _ports(self._said(*names))
            if ports is not None:
                args += port_args(names[0], rank.port(names[0], ports), rank.tensor)
        if not rank.data:
            return args
        # The daemon knows its tensor-parallel rank alone, which another engine of this host has as well.
        endpoint = self._said("pd_connector_endpoint")
        if isinstance(endpoint, str) and endpoint:
            if "{rank}" not in endpoint:
                raise OptionError(
                    f"pd_connector_endpoint = {endpoint!r} is that of every data-parallel rank; put {{rank}} into it, or leave "
                    "it out"
                )
            endpoint = endpoint.replace("{rank}", f"dp{rank.data}-{{rank}}")
            args += ["--set", f"pd_connector_endpoint={endpoint}"]
        if self._said("pd_buffer_device", "nixl_buffer_device") == "cuda" and kv_device.startswith("cuda"):
            args += ["--set", f"pd_buffer_device={kv_device}"]
        return args

    def own_hosts(self) -> list[str]:
        """What other servers call this one, as far as the configuration says."""
        given = {**self._yaml(), **dict(self.set)}
        keys = ("pd_peer_host", "nixl_peer_host", "pd_advertise_host", "pd_rendezvous_host")
        return [self.rendezvous_host, *(_unquoted(str(given[key])) for key in keys if given.get(key))]

    def _said(self, *names: str) -> Any:
        """What is said of a key, by any of its names: by `set`, else by the file; None for nothing."""
        said = [_unquoted(value) for key, value in self.set if key in names]
        return said[-1] if said else next((self._yaml()[name] for name in names if self._yaml().get(name)), None)

    def _yaml(self) -> dict[str, Any]:
        return self._file

    @functools.cached_property
    def _file(self) -> dict[str, Any]:
        """As it was when the server started: what is written into it later is for the next start."""
        if self.config_file is None:
            return {}
        import yaml  # vLLM depends on it; nothing else here does.

        try:
            read = yaml.safe_load(Path(self.config_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise OptionError(f"config_file {self.config_file} cannot be read: {error}") from error
        if read is None:
            return {}
        if not isinstance(read, dict):
            raise OptionError(f"config_file {self.config_file} is not a map of keys")
        return read


def _parsed(name: str, value: Any) -> Any:
    if name == "set":
        return _sets(value)
    if name in ("config_file", "binary_dir", "model_name", "weights_id", "vllm_version", "rendezvous_host"):
        return _typed(name, value, str, "text")
    if name in ("lookup", "unsolicited", "daemon_log", "bidirectional_kv_xfer"):
        return _typed(name, value, bool, "true or false")
    if name in ("chunk_size", "layer_pushes"):
        return _count(name, value)
    if name == "transfer_mode":
        if value not in ("pull", "push"):
            raise OptionError(f"transfer_mode = {value!r}; expected pull or push")
        return value
    if name == "rendezvous_port":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 65536:
            raise OptionError(f"rendezvous_port = {value!r}; expected a port, or 0 for any")
        return value
    if name == "bootstrap_port":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
            raise OptionError(f"bootstrap_port = {value!r}; expected a port")
        return value
    if name in ("restarts_max", "kv_recompute_threshold"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"{name} = {value!r}; expected a whole number from 0 up")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _SECONDS_MAX:
        raise OptionError(f"{name} = {value!r}; expected seconds, above 0 and at most 86400")
    return float(value)


def _typed(name: str, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise OptionError(f"{name} = {value!r}; expected {expected}")
    return value


def _count(name: str, value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise OptionError(f"{name} = {value!r}; expected a whole number from 1 up")
    return number


def _sets(value: Any) -> tuple[tuple[str, str], ...]:
    """A map of keys, or a list of `key=value`; lists are written as YAML has them."""
    if isinstance(value, Mapping):
        return tuple((str(key).strip(), _as_yaml(item).strip()) for key, item in value.items())
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) and "=" in item for item in value):
        return tuple((key.strip(), text.strip()) for key, text in (item.split("=", 1) for item in value))
    raise OptionError(f"set = {value!r}; expected a map of keys, or a list of texts `key=value`")


def _ports(said: Any) -> list[int] | None:
    """One port or several, as the daemon reads them; None for none, and for what the daemon refuses by itself."""
    if isinstance(said, str):
        said = [text.strip() for text in said.strip().removeprefix("[").removesuffix("]").split(",")]
        said = [int(text) if text.isascii() and text.isdigit() else text for text in said]
    ports = list(said) if isinstance(said, (list, tuple)) else [said]
    read = all(isinstance(port, int) and not isinstance(port, bool) and 0 <= port < 65536 for port in ports)
    return ports if ports and read else None


def _unquoted(text: str) -> str:
    """A value of `set` as the daemon reads it, which takes it for YAML: without quotes around it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _as_yaml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_yaml(item) for item in value) + "]"
    return str(value)
