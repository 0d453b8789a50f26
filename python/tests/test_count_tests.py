"""The closing line of .ci/run."""

import subprocess

import pytest

import conftest

RUST = "running 9 tests\n\nskipped: nixl::one_chunk: no NIXL: run make test\ntest result: ok. 9 passed; 0 failed; 1 ignored; 0 measured\n"
PYTHON = "SKIPPED [1] test_x.py:3: no torch\n340 passed, 6 skipped, 1 warning in 12.34s (0:01:02)\n"


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ([RUST], "8 passed, 0 failed, 1 skipped"),
        ([RUST + RUST + PYTHON, "7 passed in 1.00s\n"], "363 passed, 0 failed, 8 skipped"),
        (["7 passed in 1.00s\n"], "7 passed, 0 failed"),
        (["test result: FAILED. 3 passed; 2 failed; 0 ignored\nsuite failed\n"], "3 passed, 2 failed"),
        (["1 failed, 3 passed, 2 errors in 0.10s\nsuite failed\n"], "3 passed, 3 failed"),
        # It did not get as far as a test, or ended in the middle of one.
        (["error: could not compile\nsuite failed\n", "7 passed in 1.00s\n"], "7 passed, 1 failed"),
        (["7 passed in 1.00s\nmake: *** [Makefile:3: test] Error 134\nsuite failed\n"], "7 passed, 1 failed"),
        (["", "7 passed in 1.00s\n"], "7 passed, 1 failed"),
        (["no tests ran in 0.01s\n"], "0 passed, 1 failed"),
        (["3 skipped in 0.01s\n"], "0 passed, 1 failed, 3 skipped"),
    ],
)
def test_what_was_left_out_or_failed_is_not_counted_as_passed(tmp_path, logs, line):
    # Broken in production: CI is green while half of its tests were left out, or a suite ended before its first test.
    paths = [tmp_path / str(number) for number in range(len(logs))]
    for path, log in zip(paths, logs, strict=True):
        path.write_text(log)
    counted = subprocess.run([conftest.TOP / "scripts" / "count-tests", *paths], capture_output=True, text=True, check=True)
    assert counted.stdout == f"{line}\n"


@pytest.mark.parametrize(("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_what_needs_nixl_is_skipped_or_fails_without_it(monkeypatch, required, outcome):
    # Broken in production: CI loses NIXL, every test of it is left out, and everything is green.
    monkeypatch.setattr(conftest, "nixl_found", lambda: False)
    monkeypatch.setenv("PD_REQUIRE_NIXL", required)
    with pytest.raises(outcome, match="NIXL_LIB_DIR"):
        conftest.need_nixl()
