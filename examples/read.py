"""Which slots are active: python examples/read.py RUN SHARDS, SHARDS being activations of the same width."""

import sys

from trainer import load
from trainer.analysis.results import rows_of

dictionary = load(sys.argv[1])
rows, sources = rows_of([sys.argv[2]], dictionary.dictionary, match_concepts=False)
acts, concept = next(iter(rows()))
z = dictionary.encode(acts)
error = (dictionary.decode(z) - acts).square().sum() / (acts - acts.mean(dim=0)).square().sum()
print(
    f"{sources.manifest.rows} rows; of the first {len(z)}: L0 {(z > 0).sum(dim=1).float().mean():.1f}, FVU {error:.3f}"
)
for slot, name in enumerate(dictionary.concepts):
    print(f"{name}: active on {(z[:, slot] > 0).float().mean():.1%}, gain {dictionary.gains.get(name, 0.0):.3f}")
