#!/usr/bin/env bash
# GSM8K in the iCoT step form: downloads 88 MB, writes data/gsm_{train,valid,test}.json. Options go to gsm8k.py.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/gsm8k.py" --form icot "$@"
