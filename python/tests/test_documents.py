"""What documents say that can be looked up."""

import re
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path.append(str(TOP / "python" / "tests" / "e2e"))

from router_processes import ROUTERS


def test_each_test_that_the_table_of_routers_names_is_there() -> None:
    # Broken in production: a feature counts as tested because of a test that was renamed or deleted.
    text = (TOP / "docs" / "routers.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    # A name that is written in another way would not be looked up.
    assert len(named) == text.count("`test_") > 20
    missing = [
        f"{file}::{test}"
        for file, test in named
        if f"\ndef {test}(" not in (TOP / "python" / "tests" / "e2e" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_the_table_of_routers_says_what_is_run() -> None:
    # Broken in production: people choose a router for what was never tried with it.
    lines = (TOP / "docs" / "routers.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if ROUTERS[0].name in line and line.startswith("|"))
    _, *names = (cell.strip() for cell in lines[first].strip("|").split("|"))
    assert names == [router.name for router in ROUTERS]
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        test, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[re.findall(r"::(test_\w+)`", test)[0]] = cells
    run = (TOP / "python" / "tests" / "e2e" / "test_routers.py").read_text(encoding="utf-8")
    assert list(rows) == re.findall(r"^def (test_\w+)\(", run, re.MULTILINE)
    for test, cells in rows.items():
        assert cells == ["no" if test in router.lacks else "yes" for router in ROUTERS], test
