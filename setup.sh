# Sourced by demo.sh and test.sh: create .venv beside this file if it is missing or out of date, and activate it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
wanted=$(cat requirements.txt requirements-dev.txt | cksum)
if [ "$(cat .venv/complete 2>/dev/null)" != "$wanted" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
    echo "setting up .venv (a few minutes, about 6 GB with the CUDA build of torch)"
    python3 -m venv .venv
    # compiling all 13,000 files takes most of a minute; each is compiled when it is first imported
    .venv/bin/pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    echo "$wanted" > .venv/complete
fi
source .venv/bin/activate
unset PYTHONDONTWRITEBYTECODE  # which some images of Docker set: every start of Python would compile torch again
# Idle OpenMP threads spin by default. If another program wants the core, that makes a step 10 to 40 times slower.
export GOMP_SPINCOUNT=1000
