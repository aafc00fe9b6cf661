#!/usr/bin/env bash
# The whole path on synthetic CT: scans, cache, encoder, two segmenters, predictions, scores, report.
# Usage: demo/run.sh FOLDER (made anew on every run). Needs the command mim3d; `make demo` sees to that.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: demo/run.sh FOLDER}
rm -rf "$out/scans" "$out/cache" "$out/pretrain" "$out/pretrained" "$out/scratch" "$out/report.html"
mkdir -p "$out"
SECONDS=0

step() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

step "1. Make labelled synthetic CT: scans to learn from, and scans held out"
mim3d phantom "$out/scans" --num_cases 10 --num_test 4 --size 96 96 80 --seed 0

step "2. Cache: preprocess once, then crop without reading scans again"
mim3d cache "$out/scans" --out "$out/cache" --window -200 300

step "3. Pre-train MiM without labels"
mim3d pretrain --config recipes/demo_pretrain.yaml --data "$out/cache" --fold 0 --out "$out/pretrain"

step "4. Fine-tune from the pre-trained encoder, and once from scratch"
mim3d finetune --config recipes/demo_finetune.yaml --data "$out/cache" --out "$out/pretrained" --weights "$out/pretrain"
mim3d finetune --out "$out/scratch" --like "$out/pretrained"

step "5. Predict the held-out scans on their own grids, and score them"
for run in pretrained scratch; do
  mim3d predict --weights "$out/$run" --input "$out/scans/imagesTs" --out "$out/$run/predictions"
  mim3d evaluate --predictions "$out/$run/predictions" --references "$out/scans/labelsTs" --out "$out/$run/scores.json"
done

step "6. Report"
mim3d report "$out/pretrain" "$out/pretrained" "$out/scratch" --out "$out/report.html"

printf '\n'
python demo/table.py "$out/pretrained/scores.json" "$out/scratch/scores.json"
printf '\nDone in %d s. Report: %s\n' "$SECONDS" "$out/report.html"
