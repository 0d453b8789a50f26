"""What a comparison found, as Markdown: medians, and ratios against the better of LMCache's two modes."""

from __future__ import annotations

import re
from dataclasses import dataclass

# At most so much of LMCache's time, by (transport, chunks).
TIME_TARGETS = {("tcp", 1): 0.25, ("tcp", 8): 0.25, ("cma", 1): 1.0, ("cma", 256): 0.5, ("tcp", 256): 0.8}
CPU_TARGET = 0.6
IDLE_TARGET = 0.02


@dataclass
class Row:
    """A pair's medians at one transport and size."""

    pair: str
    transport: str
    chunk_bytes: int
    chunks: int
    rounds: int
    ms: float
    ms_p10: float
    ms_p90: float
    gib_per_s: float
    sender_cpu_s_per_gib: float
    receiver_cpu_s_per_gib: float
    idle_cores: tuple[float, float]
    writes_by: str
    open_ms: float | None = None
    send_ms: float | None = None
    write_ms: float | None = None
    client_cpu_s_per_gib: float = 0.0

    @property
    def cpu_s_per_gib(self) -> float:
        return self.sender_cpu_s_per_gib + self.receiver_cpu_s_per_gib + self.client_cpu_s_per_gib


def verdict(ratio: float, target: float | None) -> str:
    if target is None:
        return f"{ratio:.2f} | none"
    return f"{ratio:.2f} | {target:g}: {'met' if ratio <= target else 'missed'}"


def size_of(row: Row) -> str:
    length = f"{row.chunk_bytes >> 20} MiB" if row.chunk_bytes >= 2**20 else f"{row.chunk_bytes >> 10} KiB"
    return f"{row.transport}, {row.chunks} x {length}"


def tables(rows: list[Row]) -> str:
    """Markdown. A ratio is ours / the better of LMCache's two modes, in that figure."""
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.transport, row.chunk_bytes, row.chunks), {})[row.pair] = row
    times = [
        "| median, ms (10 %, 90 %) | LMCache sync | LMCache async | ours | ratio | target "
        "| ours: `open`; from `send`, of it the write | GiB/s: LMCache, ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cpu = [
        "| CPU s per GiB | LMCache sync: sender, receiver | async | ours | our client | ratio | target |",
        "|---|---|---|---|---|---|---|",
    ]
    idle = ["| cores when idle | LMCache sync: sender, receiver | async | ours | ratio | target |", "|---|---|---|---|---|---|"]
    seen_idle = set()
    for (transport, chunk_bytes, chunks), by in cases.items():
        sync, other, ours = by["LMCache sync"], by["LMCache async"], by["ours"]
        name = size_of(ours)
        spread = [f"{row.ms:.2f} ({row.ms_p10:.2f}, {row.ms_p90:.2f})" for row in (sync, other, ours)]
        best = min(sync.ms, other.ms)
        times.append(
            f"| {name} | {' | '.join(spread)} | {verdict(ours.ms / best, TIME_TARGETS.get((transport, chunks)))} "
            f"| {ours.open_ms:.2f}; {ours.send_ms:.2f}, {ours.write_ms:.2f} "
            f"| {max(sync.gib_per_s, other.gib_per_s):.2f}, {ours.gib_per_s:.2f} |"
        )
        sides = [f"{row.sender_cpu_s_per_gib:.2f}, {row.receiver_cpu_s_per_gib:.2f}" for row in (sync, other, ours)]
        ratio = ours.cpu_s_per_gib / min(sync.cpu_s_per_gib, other.cpu_s_per_gib)
        cpu.append(f"| {name} | {' | '.join(sides)} | {ours.client_cpu_s_per_gib:.2f} | {verdict(ratio, CPU_TARGET)} |")
        if (transport, chunk_bytes) not in seen_idle:
            seen_idle.add((transport, chunk_bytes))
            cores = [f"{row.idle_cores[0]:.4f}, {row.idle_cores[1]:.4f}" for row in (sync, other, ours)]
            ratio = sum(ours.idle_cores) / min(sum(sync.idle_cores), sum(other.idle_cores))
            idle.append(
                f"| {transport}, chunks of {chunk_bytes >> 10} KiB | {' | '.join(cores)} | {ratio:.4f} "
                f"| {IDLE_TARGET}: {'met' if ratio <= IDLE_TARGET else 'missed'} |"
            )
    writes = sorted({f"{row.transport}: {row.pair} by {row.writes_by}" for row in rows})
    return "\n".join([*times, "", *cpu, "", *idle, "", "UCX's word on how it writes a chunk: " + "; ".join(writes) + "."])


def seen_transport(log: str, len_bytes: int) -> str:
    """From UCX_PROTO_INFO's tables: a title, then `| 0..inf | zero-copy | cma/memory |` for each range of lengths."""
    found, writes = "unknown", False
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 1 and "cfg#" in cells[0]:
            writes = False
            to_itself = " self cfg#" in cells[0]
        elif len(cells) == 1:
            writes = cells[0].startswith("remote memory write by ucp_put") and not to_itself
        elif writes and len(cells) == 3 and (bounds := re.fullmatch(r"(\w+)\.\.(\w+)", cells[0])):
            low, high = (float(bound) for bound in map(in_bytes, bounds.groups()))
            if low <= len_bytes <= high:
                found = f"{cells[1]}, {cells[2]}"
    return found


def in_bytes(text: str) -> float:
    """UCX writes 8184, 64K and inf."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
    return float(text.rstrip("KMG")) * scale
