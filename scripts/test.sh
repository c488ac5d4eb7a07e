#!/usr/bin/env bash
# The set-up, then pytest: all tests but the slow ones. Further arguments go to pytest.
#
#   scripts/test.sh [--all] [pytest's arguments]        --all: the slow ones too
#
# With CI=true, as root and where there is apt, a missing Slurm is installed for tests/slurm, which are skipped without.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v slurmctld > /dev/null; then
    # A mirror that does not answer must not keep the other tests from running.
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge; } > /dev/null 2>&1 || echo "test.sh: Slurm could not be installed" >&2
fi
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then args+=(-m ''); else args+=("$arg"); fi
done
exec .venv/bin/python -m pytest ${args[@]+"${args[@]}"}
