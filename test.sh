#!/usr/bin/env bash
# Run the tests on the CPU in .venv: bash test.sh [flags of pytest]; the fast ones only: bash test.sh -m "not slow"
source "$(dirname "$0")/setup.sh"
exec python -m pytest -q --durations=10 tests "$@"
