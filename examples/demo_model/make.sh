#!/bin/sh
# Trains, measures and exports the demonstration model: sh examples/demo_model/make.sh
set -eu
cd "$(dirname "$0")"
python3 -m venv run/venv
run/venv/bin/pip install --quiet -r requirements.txt
python=run/venv/bin/python
$python check.py
$python train.py --out run --minutes "${MINUTES:-42}"
$python export.py run/final.pt model
$python golden.py run/final.pt ../../tests/golden/demo_trace
$python evaluate.py run/final.pt --out run/evaluation.jsonl
$python report.py run .
