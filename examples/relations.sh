#!/usr/bin/env bash
# Relations of a pretrained model, from facts to swaps: bash examples/relations.sh MODEL TEXTS.jsonl [LAYERS]
# MODEL is a folder or a name on the hub, TEXTS has a field `text` per line; LAYERS is 12,16,20,24 unless given. Writes
# data/ and runs/ of the folder that one is in. With SmolLM2-135M and 100,000 tokens of text it takes about an hour on
# a core. The extraction goes on where it was broken off, a run that is done is not trained again.
set -euo pipefail
model=$1 texts=$2 layers=${3:-12,16,20,24}
here=$(cd "$(dirname "$0")" && pwd)
facts=data/facts/known.jsonl

# Fourteen relations, and of their prompts those that the model answers.
mkdir -p data/facts
python "$here/relations.py" data/facts/prompts.jsonl
alignsae ask --model "$model" --prompts data/facts/prompts.jsonl --match prefix --out "$facts"

# Activations: facts of three splits, and ordinary text, without the first token of a window, whose norm is giant.
alignsae extract --model "$model" --prompts "$facts" --layers "$layers" --dtype bfloat16 --out data/facts
alignsae extract --model "$model" --texts "$texts" --context 256 --skip-first 1 --heldout 20 --layers "$layers" \
    --dtype bfloat16 --out data/corpus

# A dictionary a layer. The layer is chosen on the validation facts, and the held-out ones are reported: swap.json holds
# both. docs/results.md goes on with rivals at the chosen layer.
for layer in ${layers//,/ }; do
    folder=$(printf 'layer-%02d' "$layer")
    run=runs/relations-$folder
    alignsae train --launch single --config "$here/../configs/relations.yaml" "run.dir=$run" \
        "data.sources.corpus.shards=data/corpus/$folder/train" \
        "data.sources.corpus.heldout=data/corpus/$folder/heldout" \
        "data.sources.facts.shards=data/facts/$folder/train" "data.sources.facts.heldout=data/facts/$folder/validation"
    alignsae evaluate --run "$run" --train "data/facts/$folder/train" --heldout "data/facts/$folder/validation" \
        --text "data/corpus/$folder/heldout" --out "$run/validation.json"
    alignsae evaluate --run "$run" --train "data/facts/$folder/train" --heldout "data/facts/$folder/heldout" \
        --text "data/corpus/$folder/heldout"
    alignsae swap --run "$run" --model "$model" --prompts "$facts" --match prefix --rivals none --pairs 80 \
        --alphas 1,2,4
done

# What is read and swapped, over the layers.
runs=()
for layer in ${layers//,/ }; do runs+=("runs/relations-$(printf 'layer-%02d' "$layer")"); done
python "$here/horizon.py" horizon.png "${runs[@]}"
