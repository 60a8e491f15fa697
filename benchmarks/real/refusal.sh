#!/bin/sh
# Refusal from one chat model into another, added and taken away (docs/real_models.md):
#     benchmarks/real/refusal.sh SOURCE TARGET DATA OUT
# SOURCE and TARGET are checkpoint folders or names on the Hub, DATA as tasks.py takes it. LAYERS and
# RANGE are the target's layers that are tried, and those that the map is fitted for. Half an hour of CPU time for
# SmolLM2-135M-Instruct and Qwen2.5-Coder-1.5B-Instruct, for which the defaults are.
set -e
HERE=$(cd "$(dirname "$0")" && pwd)
SOURCE=$1 TARGET=$2 DATA=$3 OUT=$4
[ ! -d "$SOURCE" ] || SOURCE=$(cd "$SOURCE" && pwd)
[ ! -d "$TARGET" ] || TARGET=$(cd "$TARGET" && pwd)
python "$HERE/tasks.py" "$DATA" "$OUT/tasks"
cd "$OUT"
steersman refine "$SOURCE" tasks/refusal-pairs.jsonl -o refusal --position target_mean
steersman map "$SOURCE" "$TARGET" tasks/texts.jsonl -o bridge --concept refusal --target-layers "${RANGE:-14-22}"
# Questions that the target answers unsteered: 32 to develop with, the others to test.
python "$HERE/answered.py" "$TARGET" tasks/refusal-task.jsonl answered.jsonl 280
head -n 33 answered.jsonl > dev.jsonl
{ head -n 1 answered.jsonl; tail -n +34 answered.jsonl; } > test.jsonl
steersman tune "$TARGET" bridge refusal --task dev.jsonl --test test.jsonl --keep tasks/ordinary.jsonl \
    --cost "kl <= 0.5" --layers "${LAYERS:-16,18,20}" --doses 0.25,0.35,0.5 --finalists 1 \
    --dev-items 24 --test-items 110 --cost-items 16 --batch-size 64 -o refusing
python "$HERE/lost.py" "$TARGET" refusing tasks/ordinary.jsonl 320 > lost.json
steersman evaluate "$TARGET" --task tasks/overrefusal-task.jsonl --task tasks/unsafe-task.jsonl \
    --steering reversed=refusing@-1 --random 0 -o taken-away
python "$HERE/shuffled.py" bridge refusal "$TARGET" refusing@-1 tasks/overrefusal-task.jsonl shuffled.json
python "$HERE/collect.py" refusal=refusing-tuning taken-away=taken-away lost=lost.json shuffled=shuffled.json
