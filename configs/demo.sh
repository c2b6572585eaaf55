#!/usr/bin/env bash
# The whole result of the paper in small, in about ten minutes on two CPU cores, in data/, models/ and runs/ of the
# folder that one is in. `make demo` and `alignsae demo` call this with the environment's bin folder in PATH. Every
# stage can be run again by hand; a second run starts anew.
set -euo pipefail
configs=$(cd "$(dirname "$0")" && pwd)
began=$(date +%s)
# Models this small gain little from a second thread, lose much to it on a busy machine, and one thread gives the same
# numbers on any number of cores.
export OMP_NUM_THREADS=1
layer=layer-01
rm -rf data/demo models/demo runs/demo runs/demo-unsupervised

echo "== 1/7 biographies"
alignsae biographies --out data/demo --persons 300

echo "== 2/7 language model"
alignsae finetune-lm --data data/demo --out models/demo --steps 700 --warmup 60 --lr 3e-3 --vocabulary 4096

echo "== 3/7 activations"
alignsae extract --model models/demo --prompts data/demo/questions.jsonl --layers 1 --out data/demo

echo "== 4/7 concept-aligned dictionary: pretrain, then align"
alignsae train --launch single --config "$configs/demo.yaml" "data.shards=data/demo/$layer/train"

echo "== 5/7 unsupervised dictionary, for comparison"
alignsae train --launch single --config "$configs/demo_unsupervised.yaml" "data.shards=data/demo/$layer/train"

echo "== 6/7 evaluation and swaps"
alignsae evaluate --run runs/demo --train "data/demo/$layer/train" --heldout "data/demo/$layer/heldout" \
    --unsupervised runs/demo-unsupervised --model models/demo --prompts data/demo/questions.jsonl
alignsae swap --run runs/demo --model models/demo --prompts data/demo/questions.jsonl --rivals probe,erasure

echo "== 7/7 report"
alignsae report --run runs/demo
echo $(($(date +%s) - began)) > runs/demo/seconds
alignsae summary --run runs/demo --lm models/demo --unsupervised runs/demo-unsupervised \
    --seconds-file runs/demo/seconds --bars "$configs/demo_bars.yaml"
