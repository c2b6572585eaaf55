"""Small data to train on."""

from pathlib import Path

import torch

from trainer.stream import ShardSpec, ShardWriter

ROWS, WIDTH, CONCEPTS, ANSWERS = 496, 12, ["born", "studied", "works"], 5
PARTS = 30  # directions that rows are sparse sums of


def write_data(
    folder: Path,
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    concepts: list[str] = CONCEPTS,
    dtype: str = "float16",
    factors: dict[int, float] | None = None,
    several: bool = False,
) -> Path:
    """Shards, in blocks of 20, of rows that are sparse sums of directions, one of them their concept's; row i is
    multiplied by factors[i].

    Most labels of the first half are known and most of the second are not, so that ranks get unequal numbers of them.
    A row without a known concept has no answer. No concepts, no answers. With `several`, rows list up to two concepts,
    one labelled row in five has explicitly none.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    codes = (random(rows, PARTS) < 0.1) * random(rows, PARTS)
    acts = codes @ torch.randn(PARTS, width, generator=generator)
    concept = answer = torch.full((rows,), -1)
    if concepts:
        true = torch.randint(len(concepts), (rows,), generator=generator)
        acts += torch.randn(len(concepts), width, generator=generator)[true]
        hidden = random(rows) < torch.where(torch.arange(rows) < rows // 2, 0.2, 0.9)
        concept = torch.where(hidden, -1, true)
        answer = (true + torch.randint(2, (rows,), generator=generator)) % ANSWERS
        answer = torch.where(hidden | (random(rows) < 0.2), -1, answer)
    for row, factor in (factors or {}).items():
        acts[row] *= factor
    if several:
        second = torch.where((concept >= 0) & (random(rows) < 0.4), (concept + 1) % len(concepts), -1)
        acts += torch.randn(len(concepts), width, generator=generator)[second] * (second >= 0)[:, None]
        concept = torch.stack([concept, second], dim=1)
        concept[(concept[:, 0] >= 0) & (random(rows) < 0.2)] = torch.tensor([-2, -1])
    answers = [f"a{i}" for i in range(ANSWERS)] if concepts else []
    # With factors: as if the normalisation had been measured on the other rows.
    usual = ([0.0] * width, 3.0) if factors else None
    spec = ShardSpec(width=width, dtype=dtype, concepts=concepts, answers=answers, model="none", hook_point="layer-01")
    with ShardWriter(folder, "train", spec, rows_per_block=20, normalisation=usual) as writer:
        writer.write(acts, concept, answer)
    return folder
