"""scripts/gpu-check itself, on the stand-in: on the day when there is a GPU it has to work at once."""

import os
import subprocess

from conftest import TOP, binary
from gpu import stand_in_only


@stand_in_only
def test_the_script_restarts_measures_and_reports(tmp_path):
    # Broken in production: the one hour with a GPU goes into mending the script.
    environment = {**os.environ, "PD_BIN_DIR": str(binary("pd-bench").parent), "PD_ENGINES_TEST": ""}
    ended = subprocess.run(
        [TOP / "scripts" / "gpu-check", "--stand-in", "--no-tests"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = ended.stdout
    assert "No figure below means anything" in report and "**FAILED**" not in report
    assert "leave no GPU memory taken: ok" in report
    rows = [line for line in report.splitlines() if line.startswith("| one ")]
    assert len(rows) == 3 and all("send` to `sent" in row for row in rows), report


@stand_in_only
def test_the_script_does_not_call_a_failure_a_success(tmp_path):
    # Broken in production: a report from a card says that all is well where nothing ran.
    failing = tmp_path / "engines"
    failing.write_text("#!/bin/sh\necho 'test result: FAILED. 3 passed; 1 failed; 0 ignored'\nexit 1\n")
    failing.chmod(0o755)
    environment = {**os.environ, "PD_BIN_DIR": str(binary("pd-bench").parent), "PD_ENGINES_TEST": str(failing)}
    ended = subprocess.run(
        [TOP / "scripts" / "gpu-check", "--stand-in", "--no-tests"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 1 and "**FAILED**" in ended.stdout, ended.stdout
