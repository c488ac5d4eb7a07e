#!/usr/bin/env bash
# From nothing to a trained model: the set-up, a data set, and two attention and two expert ranks on this machine.
#
#   scripts/quickstart.sh [--cuda cu126] [arguments of `hetermoe train`]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
setup=()
train=()
while [ $# -gt 0 ]; do
    case "$1" in
        --) train+=("$@"); break ;;
        --cuda) setup+=("${@:1:2}"); shift; [ $# -eq 0 ] || shift ;;
        --cuda=*) setup+=("$1"); shift ;;
        *) train+=("$1"); shift ;;
    esac
done
scripts/setup.sh ${setup[@]+"${setup[@]}"}
.venv/bin/hetermoe data --stdlib --out runs/quickstart/data/stdlib
exec .venv/bin/hetermoe train scripts/recipes/quickstart.yaml ${train[@]+"${train[@]}"}
