"""The package as `pip install` leaves it, and the shortest way to name its connector."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import harness
import prompts
from harness import TOP, Server

#: What a router asks prefill with.
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}
#: Few blocks, and prompts that fit.
ARGS = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its metadata; the sources are left as they are."""
    build = tmp_path_factory.mktemp("build")
    source = shutil.copytree(TOP / "python", build / "python", ignore=shutil.ignore_patterns("tests", "*.egg-info", "build"))
    call = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", call, str(build)], cwd=source, check=True, capture_output=True, text=True, timeout=120
    )
    target = tmp_path_factory.mktemp("installed")
    # A wheel of nothing but Python is installed where it is unpacked.
    with zipfile.ZipFile(build / built.stdout.split()[-1]) as wheel:
        wheel.extractall(target)
    return target


def test_the_connector_is_known_by_its_name_alone(installed: Path, model: Path, folder: Path) -> None:
    # Broken in production: a flag with a Python path in it, which everybody copies wrong.
    kv = harness.connector_config("kv_producer", {"pd_buffer_size": "64MiB"}, module=None)
    server = Server("installed", folder, model, kv=kv, args=ARGS, package=installed)
    try:
        server.wait_ready()
        answer = server.complete(prompts.BY_LENGTH[max(prompts.LENGTHS)], 1, kv_transfer_params=dict(ASKED))
        assert answer["kv_transfer_params"]["remote_port"] == int(server.daemon_ready()["rendezvous_port"])
    finally:
        server.close()
