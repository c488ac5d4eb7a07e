#!/usr/bin/env bash
# The set-up, then pytest: all tests but the slow ones. Further arguments go to pytest.
#
#   scripts/test.sh [--all] [pytest's arguments]        --all: the slow ones too
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then args+=(-m ''); else args+=("$arg"); fi
done
exec .venv/bin/python -m pytest ${args[@]+"${args[@]}"}
