#!/bin/sh
# Trains, measures and exports the demonstration model: sh examples/demo_model/make.sh
set -eu
cd "$(dirname "$0")"
python3 -m venv run/venv
run/venv/bin/pip install --quiet -r requirements.txt
python=run/venv/bin/python
$python check.py
$python train.py --out run --minutes "${MINUTES:-42}"
$python train.py --out run/second --init run/final.pt --minutes "${MORE:-5}" --muon 0.006 --adam 0.0012 --seed 2 \
    --workers 1,2,3,3,4,4,4
$python export.py run/second/final.pt model
$python golden.py run/second/final.pt ../../tests/golden/demo_trace 6 5
$python evaluate.py run/second/final.pt --out run/evaluation.jsonl
$python report.py run .
