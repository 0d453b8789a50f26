"""Stands in for setuptools while pip fetches a source package that is only to be unpacked: nothing is built."""

from __future__ import annotations

import re
import shutil
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """What the package says of itself in PKG-INFO, which pip compares with what it was asked for."""
    said = Path("PKG-INFO").read_text(encoding="utf-8")
    name, version = (re.search(rf"^{field}: (\S+)$", said, re.MULTILINE) for field in ("Name", "Version"))
    assert name is not None and version is not None, "PKG-INFO names no package and version"
    folder = Path(metadata_directory) / f"{name[1].replace('-', '_')}-{version[1]}.dist-info"
    folder.mkdir()
    shutil.copy("PKG-INFO", folder / "METADATA")
    return folder.name
