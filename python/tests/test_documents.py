"""What documents say that can be looked up."""

import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


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
