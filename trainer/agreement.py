"""What all ranks must bring alike: compared by digest before anything depends on it, and item by item where the digests
differ."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from trainer.errors import UserError
from trainer.redact import redact
from trainer.topology import Topology

PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "safetensors")
LONGEST = 80  # characters of a value in a message


class AgreedError(UserError):
    """Raised on all ranks together with the same text, so that one of them can say it for all."""


def versions() -> dict[str, str]:
    """Digest of this program's own sources, and the versions of what computes."""
    found = {"version of python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[f"version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    return {"version of trainer (digest of its sources)": source_digest(), **found}


def source_digest(folder: Path | None = None) -> str:
    """Digest of names and contents of all sources below a folder (default: this package); 16 hex digits."""
    folder, digest = folder or Path(__file__).parent, hashlib.blake2b(digest_size=8)
    for path in sorted(path for suffix in ("*.py", "*.cpp", "*.h") for path in folder.rglob(suffix)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def require_agreement(facts: Mapping[str, str], topology: Topology) -> None:
    """Raise AgreedError on every rank unless all ranks bring the same facts; it names what differs, and on which ranks.

    Called on all ranks.

    It works whatever the facts are: two collectives of fixed size and, where digests differ, one as long as the longest
    rank's facts.
    """
    if topology.world == 1:
        return
    mine = json.dumps(dict(facts), sort_keys=True).encode()
    digest = hashlib.blake2b(mine, digest_size=32).digest()
    if len(set(topology.share(digest))) == 1:
        return
    everyone = [json.loads(text) for text in topology.share(mine)]
    raise AgreedError(difference(everyone) or "ranks disagree; start all of them with the same command")


def difference(everyone: list[dict[str, str]]) -> str:
    """What the ranks' facts (in the order of ranks) differ in, in one line; "" for nothing."""
    names = sorted({name for facts in everyone for name in facts})
    found = []
    for name in names:
        values: dict[str | None, list[int]] = {}
        for rank, facts in enumerate(everyone):
            values.setdefault(facts.get(name), []).append(rank)
        if len(values) > 1:
            shown = ", ".join(f"{_shown(value)} on {_ranks(ranks)}" for value, ranks in values.items())
            found.append(f"{name}: {shown}")
    if not found:
        return ""
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return f"ranks disagree on {'; '.join(found[:3])}{more}; start all of them with the same command, code and data"


def _shown(value: str | None) -> str:
    if value is None:
        return "nothing"
    text = redact(value.strip("'\""))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> ranks 0-2, 5"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def decide(problem: str, topology: Topology) -> None:
    """Raise AgreedError on every rank with the main rank's `problem`, unless that is "".

    Called on all ranks; others bring "".
    """
    said = topology.share(problem.encode() if topology.is_main else b"")[0].decode()
    if said:
        raise AgreedError(said)
