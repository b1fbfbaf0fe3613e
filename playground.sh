#!/usr/bin/env bash
# Open a page to play with the codes of what demo.sh trained: bash playground.sh [flags of playground.py]
# The emoji if bash demo.sh emoji was run, else the digits, for which demo.sh is run first if it was not.
source "$(dirname "$0")/setup.sh"
python -c "import gradio" 2>/dev/null || pip install --quiet --disable-pip-version-check -r requirements-playground.txt
out=demo_output
[ -d demo_output_emoji/results_prior/best ] && out=demo_output_emoji
[ -d $out/results_prior/best ] || bash demo.sh
exec python playground.py --ckpt $out/results --prior $out/results_prior --features-path $out/features_heldout --open "$@"
