#!/usr/bin/env bash
# Style, types and tests.  Further arguments go to pytest:
#
#   bash launch/test.sh                                    everything
#   bash launch/test.sh -m fast                            a minute's worth: settings, data, records, documents
#   bash launch/test.sh -m "not slow and not faults"       all but what starts a launcher or kills a run
#   bash launch/test.sh tests/data/test_curriculum.py -x

source "$(dirname "$0")/setup.sh" --tests "$@"

export HF_HUB_OFFLINE=1 WANDB_MODE=offline

failed=0
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || failed=1
exit $failed
