#!/usr/bin/env bash
# Has the planner make every plan that is shipped here anew: RECIPE.CLUSTER.plan.json. Takes some minutes.
#
#   scripts/recipes/plan.sh [RECIPE...]        without .yaml; default: all
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for plan in scripts/recipes/*.plan.json; do
    name=${plan##*/}
    recipe=${name%%.*}
    cluster=${name#*.}
    if [ $# -eq 0 ] || [[ " $* " == *" $recipe "* ]]; then
        .venv/bin/hetermoe plan "scripts/recipes/$recipe.yaml" \
            --cluster "scripts/recipes/${cluster%.plan.json}.cluster.yaml" --out "$plan"
    fi
done
