#!/usr/bin/env bash
# Regenerates results/: trains the rows of ESPCN that it lacks, publishes them, and writes tables, figures and report.
# Stopped and started again, it goes on. Needs t91/ and set5/ in the folder that QPRUNE_DATA names.
#
#   make results                              tables 2, 3 and 4 with ten seeds, Fig. 4 with five
#   make results ARGS="seed=range(3)"         another number of seeds, and any KEY=VALUE for all runs
set -euo pipefail
cd "$(dirname "$0")/.."
qprune=.venv/bin/qprune tables="--output results/tables" # these are committed; other commands write below results_dir

seeds="seed=range(10)" keys=()
for word in "$@"; do
    if [[ $word == seed=* ]]; then seeds=$word; else keys+=("$word"); fi
done

status=0
for table in 3 2 4; do # the first order saves the float part, and the others start from it (trainer.warm_start)
    "$qprune" tables "$table" $tables --run-missing task=espcn "$seeds" "${keys[@]}" || status=1
done
[[ $seeds != "seed=range(10)" ]] || seeds="seed=range(5)"
"$qprune" tables window $tables --run-missing task=espcn "$seeds" "${keys[@]}" || status=1
"$qprune" tables variants $tables task=espcn "${keys[@]}" > /dev/null || status=1 # of those that are there
.venv/bin/python scripts/publish_results.py || status=1
.venv/bin/python scripts/write_cards.py || status=1
"$qprune" tables order $tables || status=1
.venv/bin/python docs/extensions/pictures.py docs/assets || status=1 # the README's
"$qprune" report --output results/report.html --runs 4 task=espcn "${keys[@]}" || status=1
exit $status
