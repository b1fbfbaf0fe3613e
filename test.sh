#!/usr/bin/env bash
# Run the tests on the CPU in .venv, two at a time: bash test.sh [flags of pytest]
# The fast ones only: bash test.sh -m "not slow"; all in one process, to use a debugger: bash test.sh -n 0
source "$(dirname "$0")/setup.sh"
exec python -m pytest -q -n 2 --dist worksteal --durations=10 tests "$@"
