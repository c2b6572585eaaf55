"""What configuration, data and launch fix before any other rank is asked, and every refusal that needs no other
rank."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import checkpoint, pretrained
from trainer.agreement import versions
from trainer.config import Config, flatten
from trainer.curriculum import Curriculum, L0Target
from trainer.dictionary import GATES, DictionaryConfig, DictionaryForm
from trainer.errors import UserError
from trainer.extraction import Live
from trainer.heldout import check_evaluation, load_heldout
from trainer.optimizer import OptimConfig
from trainer.run_folder import RunFolder
from trainer.strategies import LaunchFile, Layout, launch_file
from trainer.stream import (
    DataConfig,
    Manifest,
    Mixture,
    Order,
    Plan,
    Sources,
    Stretch,
    lane_rows,
    lanes_of_rank,
    load_manifests,
)

# Settings that ranks may hold different values of: nodes have disks of their own, and the content of a cache is
# checked.
OWN_TO_A_RANK = ("data.cache_dir",)


@dataclass(frozen=True)
class Inputs:
    """A run before it has ranks."""

    config: Config
    layout: Layout
    sources: Sources
    plan: Order
    curriculum: Curriculum
    form: DictionaryForm
    heldout: dict[str, Manifest] = field(default_factory=dict)  # by source, of those that have held-out rows

    @property
    def manifest(self) -> Manifest:
        """What the sources have in common."""
        return self.sources.manifest

    def facts(self) -> dict[str, str]:
        """All that ranks must have in common: name -> value."""
        settings = {key: value for key, value in flatten(self.config).items() if key not in OWN_TO_A_RANK}
        layout = {f"launch.{key}": value for key, value in asdict(self.layout).items()}
        data = {}
        for key, manifest in zip(self.config.data.locations(), self.sources.manifests.values(), strict=True):
            data[f"digest of the manifest at {key}"] = manifest.digest
            data[f"median_norm of the manifest at {key}"] = str(manifest.median_norm)
        for key, manifest in zip(self.config.data.heldout_locations(), self.heldout.values(), strict=True):
            data[f"digest of the manifest at {key}"] = manifest.digest
        return {key: repr(value) for key, value in {**settings, **layout, **versions(), **data}.items()}


def read_inputs(config: Config, world: int | None = None, live: Live | None = None) -> Inputs:
    """All refusals that need no other rank. `world`: launched processes; None: as few as the configuration can do with.
    live: what computes the live sources; None: rows are not read.

    Raises UserError or DataError, one line, for settings, data and launch that do not go together.
    """
    config = taken_over(config, launch_file())
    data = config.data
    manifests = load_manifests(data, live.manifests if live else None)
    mixes = [
        lane_rows(stage.mix, list(manifests), data.global_batch, data.lanes, f"stages.{number}.mix")
        for number, stage in enumerate(config.stages)
    ]
    computers = live.computers if live else {}
    sources = Sources(manifests, next(iter(mixes[0])) if mixes else None, "data.sources.", computers)
    manifest = sources.manifest
    config = begun(config, manifest)
    world = world or config.parallel.dictionary_ranks
    layout = config.parallel.resolve(world, config.dictionary.banks)
    config.optim.refuse_sharding(layout.zero_stage)
    if config.optim.accumulate > config.data.global_batch:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate} is more than the rows of a step, "
            f"data.global_batch={config.data.global_batch}; lower it"
        )
    lanes_of_rank(data.lanes, 0, world // layout.dictionary_ranks)
    epochs = [manifests[first].rows // (mix[first] * data.lanes) for mix in mixes for first in [next(iter(mix))]]
    target = l0_target(config.dictionary, manifest.width)
    curriculum = Curriculum(config.stages, config.loss, config.optim, epochs, target)
    plan = row_order(data, config.run.seed, sources, [*map(Stretch, curriculum.starts, mixes)])
    if not GATES[config.dictionary.gate].jumps and any(weights.pull for weights in curriculum.weights):
        raise UserError(
            f"loss.pull pulls dead slots towards thresholds that are trained, and dictionary.gate="
            f"{config.dictionary.gate} has none; set dictionary.gate=jumprelu or leave it 0"
        )
    if config.dictionary.target_l0 and not any(weights.sp for weights in curriculum.weights):
        raise UserError(
            f"dictionary.target_l0={config.dictionary.target_l0} needs a weight of sparsity to begin with; set loss.sp"
        )
    if "pretrain" in curriculum.names and config.dictionary.freeze == "free":
        raise UserError(
            "stage pretrain trains the free slots, which dictionary.freeze=free holds; drop the stage or set "
            "dictionary.freeze=none"
        )
    if "align" in curriculum.names:
        number = curriculum.names.index("align")
        if not any(manifests[name].concepts for name in mixes[number]):
            asked = f"no source of stages.{number}.mix" if data.sources else "the manifest of data.shards"
            names = "names" if data.sources else "names no"
            raise UserError(
                f"stage align needs labelled rows, but {asked} {names} concepts; drop the stage or extract with labels"
            )
    if config.loss.binding == "softmax" and (negatives := data.negatives()):
        raise UserError(
            f"{negatives[0]}=none makes negatives of rows, and loss.binding=softmax counts none; "
            f"set loss.binding=sigmoid or {negatives[0]}=unknown"
        )
    aligns = "align" in curriculum.names and bool(manifest.concepts)
    heldout = load_heldout(data, sources)
    check_evaluation(data, config.run.evaluate_every, config.checkpoint.best, aligns, heldout)
    form = config.dictionary.form(manifest.width, manifest.concepts, len(manifest.answers))
    return Inputs(config, layout, sources, plan, curriculum, form, heldout)


def row_order(data: DataConfig, seed: int, sources: Sources, stretches: list[Stretch]) -> Order:
    """The order of the rows of a run. Raises UserError for data smaller than what a step takes of it."""
    if data.sources:
        return Mixture(sources.manifests, seed, data.global_batch, data.lanes, data.window, stretches)
    return Plan(sources.manifest, seed, data.global_batch, data.lanes, data.window)


def l0_target(chosen: DictionaryConfig, width: int) -> L0Target | None:
    """Where the gate, or the weight of sparsity, is to keep the number of active free slots; None where nothing keeps
    one, or slots are held."""
    by_gate = GATES[chosen.gate].fixes_l0
    wanted = chosen.k if by_gate else chosen.target_l0
    if not wanted or chosen.freeze == "free":
        return None
    # A dictionary that others trained has its threshold already.
    usual = wanted if chosen.start_from else max(1, min(width, chosen.free_slots // 2))
    return L0Target(wanted, chosen.initial_l0 or usual, chosen.k_fall, by_gate)


def begun(config: Config, manifest: Manifest) -> Config:
    """The configuration with the form of the dictionary that the run begins with (dictionary.start_from).

    A run that goes on takes it from its own checkpoint: the source may be gone. Raises UserError for a source that does
    not go with configuration or data.
    """
    chosen = config.dictionary
    if not chosen.start_from:
        return config
    kept = checkpoint.kept_form(config.checkpoint.resume, RunFolder(Path(config.run.dir)).checkpoints)
    theirs = pretrained.Start(chosen, manifest).form if kept is None else kept
    chosen = pretrained.take_over(chosen, theirs)
    chosen.validate()  # what goes with one gate does not with another
    return replace(config, dictionary=chosen)


def taken_over(config: Config, launch: LaunchFile) -> Config:
    """The configuration with what the launch file says about numbers, where the configuration leaves the default.

    Raises UserError where both say something, and not the same.
    """
    if launch.precision and launch.precision != config.run.precision:
        raise UserError(
            f"mixed_precision={launch.precision} of the launch file, but run.precision={config.run.precision}; "
            f"set mixed_precision: 'no' there: run.precision decides"
        )
    changes: dict[str, Any] = {}
    for name, there, value in (
        ("accumulate", "gradient_accumulation_steps", launch.accumulate),
        ("clip", "gradient_clipping", launch.clip),
    ):
        ours, default = getattr(config.optim, name), getattr(OptimConfig(), name)
        if value is None or value == ours:
            continue
        if ours != default:
            raise UserError(
                f"{there}={value:g} of the launch file, but optim.{name}={ours:g}; "
                f"take it out of the launch file: optim.{name} decides"
            )
        changes[name] = value
    if not changes:
        return config
    optim = replace(config.optim, **changes)
    optim.validate()
    return replace(config, optim=optim)
