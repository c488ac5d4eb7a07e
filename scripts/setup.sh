#!/usr/bin/env bash
# Makes .venv in the repository's root and installs this package, once; a second start only looks whether all is there.
#
#   scripts/setup.sh [--cuda cu126]
#
# PYTHON=/path/to/python is tried first; the interpreter must be 3.12 or newer. A torch that is there already, in .venv
# or in that interpreter, is never replaced; --cuda chooses the build of one that is not (V100 needs cu126).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
STAMP="$VENV/hetermoe-setup"
TORCH='torch==2.11.*'
CUDA=''

fail() { printf 'setup: %s\n' "$@" >&2; exit 2; }
say() { printf 'setup: %s (%d s)\n' "$1" "$SECONDS"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --cuda) [ $# -ge 2 ] || fail "--cuda needs a build of torch, as cu126"; CUDA=$2; shift 2 ;;
        --cuda=*) CUDA=${1#--cuda=}; shift ;;
        *) fail "unknown argument $1; it takes --cuda BUILD only" ;;
    esac
done
[[ "$CUDA" =~ ^(cu[0-9]+|cpu)?$ ]] || fail "--cuda $CUDA: a build of torch is named as cu126, or cpu"

# What was installed is described by the inputs of the installation, so a changed setup.py installs again.
inputs() { cksum < "$ROOT/setup.py"; echo "$ROOT"; }
healthy() {
    [ -x "$VENV/bin/python" ] || return 1
    "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

if healthy && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(inputs)" ]; then
    if [ -n "$CUDA" ]; then
        INSTALLED=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
        [[ "$INSTALLED" == *"+$CUDA" ]] || say "keeping torch $INSTALLED, which is there; remove .venv for $CUDA"
    fi
    exit 0
fi

candidates() {
    local name folder
    for name in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3.15 python3; do
        command -v "$name" || true
    done
    for folder in "${PYENV_ROOT:-$HOME/.pyenv}" "$HOME/.pyenv"; do
        for name in "$folder"/versions/*/bin/python3; do [ ! -x "$name" ] || echo "$name"; done
    done
}

find_python() {
    local python version
    SEEN=''
    while IFS= read -r python; do
        # pyenv's shims are on PATH for versions that are not chosen, and then fail
        version=$("$python" -c 'import sys, venv, ensurepip; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) ||
            continue
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
            FOUND=$python
            return 0
        fi
        SEEN="$SEEN $python ($version)"
    done
    return 1
}

if ! healthy; then
    FOUND=''
    find_python < <(candidates) || fail \
        "no Python 3.12 or newer with venv was found, and megatron-core needs one." \
        "looked at PYTHON, python3.12 to python3.15 and python3 on PATH, and ${PYENV_ROOT:-$HOME/.pyenv}/versions." \
        "found:${SEEN:- none}" \
        "to get one: pyenv install 3.12, or apt install python3.12 python3.12-venv, or conda create -p D python=3.12;" \
        "then start this again, with PYTHON=/path/to/python3.12 if it is somewhere else."
    SITE=''
    # the range is that of setup.py
    if "$FOUND" -c 'import torch; exit(not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15))' \
        2>/dev/null; then
        SITE='--system-site-packages'
    fi
    [ ! -e "$VENV" ] || say ".venv is broken or too old; making it anew"
    say "making .venv with $FOUND${SITE:+ and the torch that it has}"
    "$FOUND" -m venv --clear $SITE "$VENV"
fi

PIP=("$VENV/bin/python" -m pip --disable-pip-version-check install -qq)
CONSTRAINT=$(mktemp)
trap 'rm -f "$CONSTRAINT"' EXIT

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    say "installing $TORCH${CUDA:+ for $CUDA}; this takes minutes"
    "${PIP[@]}" "$TORCH" ${CUDA:+--index-url "https://download.pytorch.org/whl/$CUDA"}
fi
"$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > "$CONSTRAINT"
say "installing megatron_hetermoe beside $(cat "$CONSTRAINT")"
"${PIP[@]}" --constraint "$CONSTRAINT" --editable "$ROOT[test]"
inputs > "$STAMP"
say "ready"
