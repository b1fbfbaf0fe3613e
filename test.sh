#!/usr/bin/env bash
# Run the tests, on the CPU, in .venv: bash test.sh [flags of pytest]
source "$(dirname "$0")/setup.sh"
exec python -m pytest -q --durations=10 tests "$@"
