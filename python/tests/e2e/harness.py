"""Real vLLM servers on a CPU, with the tiny model: started, asked, and taken down."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[3]
sys.path.append(str(TOP / "python" / "tests"))

from free_ports import free_ports

MODEL_NAME = "tiny"
BLOCK_TOKENS = 128
START_TIMEOUT_S = 240.0
#: A block of each request is not sent from its place, and answers that are right otherwise have to be wrong: an
#: expectation that these meet as well shows so.
MISPLACED = os.environ.get("PD_E2E_MISPLACE") == "1"

ENVIRONMENT = {
    # The engine's core in the server's own process: half the memory, half the start.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Some routers ask over a connection that the server is just closing, and their client or their decode server hears of it alone.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_LOGGING_LEVEL": "INFO",
}

#: By PD_E2E_ISA: servers do without the newer instructions that this processor has, and round as an older one does.
_OLDER_PROCESSOR = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


class HttpError(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


def post(
    url: str, body: dict[str, Any], timeout_s: float = 120.0, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """The JSON that comes back. Raises `HttpError`, or `OSError` where nobody answers."""
    return json.loads(post_text(url, body, timeout_s, headers))


def post_text(
    url: str, body: dict[str, Any], timeout_s: float = 120.0, headers: dict[str, str] | None = None
) -> str:
    """As `post`, whatever comes back."""
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise HttpError(error.code, error.read().decode("utf-8", "replace")) from None


def metric(url: str, name: str, labels: Sequence[str] = ()) -> float:
    """The sum of this metric over all lines that have these labels."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line) and all(label in line for label in labels)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def until(holds: Callable[[], bool], otherwise: object, timeout_s: float = 60.0) -> None:
    """Waits for what is to come. Raises `AssertionError` with `otherwise`, as it is by then, where it does not."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether there is such a process that is not only waiting to be collected."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def hang_up(url: str, body: dict[str, Any], under_way: Callable[[], bool]) -> None:
    """Asks for a completion, and closes the connection as soon as it is under way."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        until(under_way, f"what {url} was asked for is not under way")
    finally:
        connection.close()


def completion_body(prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """Greedy, by token ids."""
    return {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "detokenize": False,
        "return_token_ids": True,
        **more,
    }


def tokens_of(answer: dict[str, Any]) -> list[int]:
    """What was generated."""
    return answer["choices"][0]["token_ids"]


class Process:
    """A child with its output in a file, ended with everything it started."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.log_path = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                # A group of its own to end, in our session: Linux shares processors between sessions, and a server whose
                # tensor-parallel workers spin in theirs has starved the other one for a minute.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_healthy(self, url: str, timeout_s: float, path: str = "/health") -> None:
        """Until `url` answers so at this path. Raises `RuntimeError` with the end of its log."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.running():
                raise RuntimeError(f"{self.log_path.stem} has ended:\n{self.log()[-4000:]}")
            try:
                with urllib.request.urlopen(url + path, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{self.log_path.stem} did not serve within {timeout_s} s:\n{self.log()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL to the process alone: what it started has to notice by itself."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class Server(Process):
    """`vllm serve`, as far as the CPU package has it."""

    def __init__(
        self, name: str, folder: Path, model: Path, *, kv: dict[str, Any] | None = None, args: Sequence[str] = (),
        env: dict[str, str] | None = None, tensor_parallel: int = 1, eager: bool = True, dtype: str = "float32",
        package: Path = TOP / "python", tokenizer: bool = False, host: str = "127.0.0.1", inside: Sequence[str] = (),
        random_weights: bool = False,
    ) -> None:
        """`package`: the folder that has `pd_backend`. `tokenizer`: the model has one, and clients may ask in text. `host`: what it
        binds, `inside` the command that runs it where that address is. `random_weights`: the model is a configuration alone.
        """
        self.name = name
        (self.port,) = free_ports(1)
        self.url = f"http://{host}:{self.port}"
        command = [*inside, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", MODEL_NAME, "--host", host]
        command += [] if tokenizer else ["--skip-tokenizer-init"]
        command += ["--port", str(self.port), "--tensor-parallel-size", str(tensor_parallel), "--dtype", dtype]
        # A worker of its own is a process more: only where there are several.
        command += ["--distributed-executor-backend", "uni" if tensor_parallel == 1 else "mp"]
        if eager:
            command.append("--enforce-eager")
        if kv is not None:
            command += ["--kv-transfer-config", json.dumps(kv)]
        python_path = [str(package), str(TOP / "python" / "tests" / "e2e")]
        environment = {**os.environ, **ENVIRONMENT, **(env or {})}
        if random_weights:
            command += ["--load-format", "dummy"]
            python_path.insert(0, str(TOP / "python" / "tests" / "e2e" / "random_weights"))
        if "PD_E2E_ISA" in environment:
            python_path.append(str(TOP / "python" / "tests" / "e2e" / "older_processor"))
            environment |= _OLDER_PROCESSOR[environment["PD_E2E_ISA"]]
        environment["PYTHONPATH"] = os.pathsep.join(python_path)
        super().__init__([*command, *args], folder / f"{name}.log", environment)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until it serves."""
        self.wait_healthy(self.url, timeout_s)

    def kill_engine(self) -> list[int]:
        """SIGKILL to all of its processes but the daemons, which have to notice by themselves, and are returned."""
        daemons = [int(ready["pid"]) for ready in self.daemons_ready().values()]
        for pid in reversed(_descendants(self.pid)):
            if pid not in daemons:
                os.kill(pid, signal.SIGKILL)
        self.kill()
        return daemons

    def complete(
        self, prompt: Sequence[int], max_tokens: int, timeout_s: float = 120.0, *, engine: int | None = None, **more: Any
    ) -> dict[str, Any]:
        """`engine`: the data-parallel rank that computes it; vLLM chooses one otherwise."""
        headers = {} if engine is None else {"X-data-parallel-rank": str(engine)}
        return post(self.url + "/v1/completions", completion_body(prompt, max_tokens, **more), timeout_s, headers)

    def external_tokens(self, engine: int | None = None) -> float:
        """Tokens of prompts that it, or this engine of it, says came from elsewhere: several connectors pass vLLM's tests, and
        move nothing.
        """
        return self.prompt_tokens("external_kv_transfer", engine)

    def computed_tokens(self) -> float:
        """Tokens of prompts that it says it has computed."""
        return self.prompt_tokens("local_compute")

    def prompt_tokens(self, source: str, engine: int | None = None) -> float:
        """Tokens of prompts by where their KV came from."""
        labels = [f'source="{source}"', "" if engine is None else f'engine="{engine}"']
        return metric(self.url + "/metrics", "vllm:prompt_tokens_by_source_total", labels)

    def reset(self) -> bool:
        """Empties its caches, the daemons' included. Whether it says that it did."""
        return bool(post(self.url + "/reset_prefix_cache?reset_external=true", {})["success"])

    def daemon_ready(self, rank: int = 0) -> dict[str, str]:
        """What the ready line of the latest daemon beside the worker of this rank said, as the connector logs it."""
        ready = self.daemons_ready()
        if rank not in ready:
            raise RuntimeError(f"server {self.name} has logged no ready line of rank {rank}:\n{self.log()[-4000:]}")
        return ready[rank]

    def daemons_ready(self) -> dict[int, dict[str, str]]:
        """The same of every rank that has a daemon: tensor-parallel or data-parallel, no server here has several of both."""
        # An engine or a worker that is a process of its own says so before each line.
        said = re.findall(
            r"^(?:\((?:Worker_TP|EngineCore_DP)(\d+) pid=\d+\))?.*ReadyLine\((.*)\)", self.log(), re.MULTILINE
        )
        return {int(rank or 0): dict(re.findall(r"(\w+)='?([^',)]+)'?", line)) for rank, line in said}


def producer(sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of a prefill server."""
    if MISPLACED:
        more |= {"module": "swapping", "name": "MisplacingConnector"}
    return connector_config("kv_producer", sets, **more)


def consumer(sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of a decode server."""
    return connector_config("kv_consumer", sets, **more)


def both(sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`--kv-transfer-config` of a server that prefills and decodes."""
    if MISPLACED:
        more |= {"module": "swapping", "name": "MisplacingConnector"}
    return connector_config("kv_both", sets, **more)


def connector_config(
    role: str, sets: dict[str, Any], *, policy: str = "fail", module: str | None = "pd_backend.vllm.connector",
    name: str = "PdConnector", **options: Any,
) -> dict[str, Any]:
    # No test here is about silence, and a daemon that gets no processor for some seconds is not dead.
    sets = {"pd_peer_timeout_sec": 60, "pd_commit_timeout_sec": 60, **sets}
    return {
        "kv_connector": name,
        **({} if module is None else {"kv_connector_module_path": module}),
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"set": sets, **options},
    }
