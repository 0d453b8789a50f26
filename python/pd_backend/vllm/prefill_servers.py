"""Where prefill servers are asked for what they have parked, of which a router names the bootstrap address alone.

They are asked by HTTP, in a thread: no step of the engine waits for the answer.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from .bootstrap import EngineAt
from .bootstrap_query import Address, ask
from .hosts import HostList
from .spec import RemoteSpec, engine_id
from .threads import Threads
from .transfer_id import TransferSpec
from .untrusted import SpecError, one_line, shown

logger = logging.getLogger("vllm.pd_backend")

#: From the question to the last byte of its answer, the look-up of the name not counted.
ANSWER_S = 3.0
#: Addresses that are asked at a time, and those that are remembered.
_ASKED_MAX = 16
_KNOWN_MAX = 256
#: An address that could not be asked is left alone for so long, and one that does not know an engine.
_FAILED_PAUSE_S = 5.0
_UNKNOWN_PAUSE_S = 1.0


@dataclass
class _Question:
    """Of a thread, which writes the last three, `done` last."""

    began: float
    engines: dict[int, EngineAt] = field(default_factory=dict)
    error: str | None = None
    done: bool = False


@dataclass
class _Known:
    """An address, and what it said last."""

    engines: dict[int, EngineAt] = field(default_factory=dict)
    error: str | None = None
    question: _Question | None = None
    #: What it said was followed in vain.
    stale: bool = False
    not_before: float = 0.0


class PrefillServers:
    """For the scheduler's thread."""

    def __init__(
        self,
        tp_size: int,
        hosts: HostList | None = None,
        bootstrap_port: int | None = None,
        answer_s: float = ANSWER_S,
    ) -> None:
        """`hosts`: those that may be asked, None for any. `bootstrap_port`: of those of which a router names no port."""
        self.bootstrap_port = bootstrap_port
        self._tp_size = tp_size
        self._hosts = hosts
        self._answer_s = answer_s
        self._known: OrderedDict[Address, _Known] = OrderedDict()
        #: Also those that nobody waits for any more.
        self._threads = Threads("pd bootstrap query", "prefill servers are being asked", _ASKED_MAX, _ASKED_MAX)

    def find(self, spec: TransferSpec) -> RemoteSpec | None:
        """Where its chunks are parked; None while its prefill server is being asked, which has a deadline.

        Raises `SpecError` for one that cannot be followed.
        """
        if self._hosts is not None and spec.host not in self._hosts:
            raise SpecError(f"its prefill server {spec.host} is not among pd_prefill_hosts")
        address = (spec.host, spec.port)
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = _Known()
        self._known.move_to_end(address)
        self._hear(known)
        is_here = not known.stale and any(at.engine == spec.engine for at in known.engines.values())
        if known.question is None and not is_here and time.monotonic() >= known.not_before:
            self._ask(address, known)
        if known.question is not None and not is_here:
            return None
        return self._remote(spec, known)

    def failed(self, spec: TransferSpec) -> None:
        """What was fetched from there did not come: it may be somewhere else by now."""
        known = self._known.get((spec.host, spec.port))
        if known is not None:
            known.stale = True
            if known.error is None:
                known.not_before = 0.0

    def _hear(self, known: _Known) -> None:
        """Takes in what was answered, if something was."""
        question = known.question
        if question is None:
            return
        if question.done:
            error = question.error
        elif time.monotonic() - question.began > 2 * self._answer_s:
            error = f"no answer within {2 * self._answer_s:g} s"
        else:
            return
        known.question, known.error = None, error
        if error is None:
            known.engines, known.stale = question.engines, False
        elif known.stale:
            known.engines = {}
        known.not_before = time.monotonic() + (_UNKNOWN_PAUSE_S if error is None else _FAILED_PAUSE_S)

    def _ask(self, address: Address, known: _Known) -> None:
        for each in [each for each in self._known if each != address and self._known[each].question is None]:
            if len(self._known) <= _KNOWN_MAX:
                break
            del self._known[each]
        question = _Question(time.monotonic())
        try:
            self._threads.start(address[0], lambda: _answer_to(question, address, self._answer_s))
        except SpecError as error:
            known.error = str(error)
        else:
            known.question = question

    def _remote(self, spec: TransferSpec, known: _Known) -> RemoteSpec:
        where = f"http://{spec.host}:{spec.port}/query"
        engines = list(known.engines.values())
        # The id is a hint: where one engine is, an id of before its restart means that one.
        at = next((at for at in engines if at.engine == spec.engine), engines[0] if len(engines) == 1 else None)
        if at is None and engines:
            raise SpecError(f"{where} has no engine {shown(spec.engine)}, but {shown(sorted(at.engine for at in engines))}")
        if at is None:
            raise SpecError(f"{where}: {known.error}")
        if len(at.ports) != self._tp_size:
            raise SpecError(f"{len(at.ports)} ranks at {where}, {self._tp_size} here; start both with the same")
        return RemoteSpec(at.host, at.ports, spec.ids, in_turn=False, engine=engine_id(at.engine, at.ports))


def _answer_to(question: _Question, address: Address, answer_s: float) -> None:
    try:
        question.engines = ask(address, answer_s)
    except (OSError, ValueError) as error:
        question.error = one_line(str(error) or type(error).__name__)
    question.done = True
