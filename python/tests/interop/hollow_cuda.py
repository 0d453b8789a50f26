"""Stand-ins for the CUDA libraries that PyPI's torch is linked against and never calls on a machine without a GPU.

    python3 hollow_cuda.py TORCH_LIB_DIR OUT_DIR

PyPI has no CPU build of torch for x86-64: its wheel asks the loader for a dozen large libraries (cuBLAS, cuDNN, NCCL, ...)
before anything runs. Here each of them that is not installed becomes a library with the same name, versions and
symbols, in which every function says its name and aborts. torch itself is untouched, and a call that would need a GPU
cannot go unnoticed. Installed ones (libcudart, which registers torch's kernels as it loads) are left alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CUDA = re.compile(r"lib(cu|nv|nccl)")
# Libraries whose symbols carry no version, by how their functions begin; the others are told by the version's name.
UNVERSIONED = {"cuFile": "libcufile.so", "cusparseLt": "libcusparseLt.so", "nccl": "libnccl.so", "nvshmem": "libnvshmem_host.so"}


def lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", "\n".join(lines("readelf", "-d", str(library)))))


def undefined(library: Path) -> set[str]:
    return {fields[1] for line in lines("nm", "-D", "--undefined-only", str(library)) if len(fields := line.split()) == 2}


def owner(symbol: str, sonames: set[str]) -> tuple[str, str] | None:
    """The library that `symbol` (name, or name@version) is looked for in, and the version, which may be empty."""
    name, _, version = symbol.partition("@")
    if version in sonames:
        return version, version
    for prefix, stem in UNVERSIONED.items():
        if version in ("", "NVSHMEM") and name.startswith(prefix):
            for soname in sonames:
                if soname.startswith(stem + "."):
                    return soname, version
    return None


def build(soname: str, symbols: set[tuple[str, str]], out: Path) -> None:
    """`out`/`soname`: every symbol a function that aborts, under the version that torch asks for."""
    by_version = defaultdict(list)
    for name, version in sorted(symbols):
        by_version[version].append(name)
    script = "".join(
        f'"{version}" {{ {" ".join(f"{name};" for name in names)} }};\n' for version, names in by_version.items() if version
    )
    code = "#include <stdio.h>\n#include <stdlib.h>\n" + "".join(
        f'void {name}(void) {{ fputs("{name} of {soname} was called, which is hollow here\\n", stderr); abort(); }}\n'
        for name, _ in sorted(symbols)
    )
    source, versions = out / "hollow.c", out / "hollow.map"
    source.write_text(code)
    versions.write_text(script)
    flags = [f"-Wl,--version-script={versions}"] if script else []
    lines("cc", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{soname}", *flags, "-o", str(out / soname), str(source))
    source.unlink()
    versions.unlink()


def main() -> None:
    torch_lib, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    libraries = sorted(torch_lib.glob("*.so*"))
    site = torch_lib.parents[1]
    installed = {path.name for path in site.glob("nvidia/**/*.so*")} | {path.name for path in libraries}
    # libcuda is the driver's; torch loads what needs it only when a GPU is used.
    sonames = {name for lib in libraries for name in needed(lib) if CUDA.match(name)} - installed - {"libcuda.so.1"}
    symbols: dict[str, set[tuple[str, str]]] = {soname: set() for soname in sonames}
    for library in libraries:
        for symbol in undefined(library):
            if (found := owner(symbol, sonames)) is not None:
                symbols[found[0]].add((symbol.partition("@")[0], found[1]))
    for soname, wanted in sorted(symbols.items()):
        build(soname, wanted, out)
        print(f"{soname}: {len(wanted)} functions")


if __name__ == "__main__":
    main()
