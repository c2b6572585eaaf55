"""Steered text: python examples/steer.py RUN MODEL PROMPT CONCEPT, RUN being a run, a checkpoint or an export."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import load, steer

run, source, prompt, concept = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
with steer(model, load(run), {concept: 2.0}) as s:
    out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
print(tokenizer.decode(out[0]), s.trace)
