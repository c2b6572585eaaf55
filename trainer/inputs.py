"""What configuration, data and launch fix before any other rank is asked, and every refusal that needs no other
rank."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer import checkpoint, pretrained
from trainer.agreement import versions
from trainer.config import Config, flatten
from trainer.curriculum import Curriculum, L0Target
from trainer.dictionary import GATES, DictionaryConfig, DictionaryForm
from trainer.errors import UserError
from trainer.optimizer import OptimConfig
from trainer.run_folder import RunFolder
from trainer.strategies import LaunchFile, Layout, launch_file
from trainer.stream import Manifest, Plan, lanes_of_rank

# Settings that ranks may hold different values of: nodes have disks of their own, and the content of a cache is
# checked.
OWN_TO_A_RANK = ("data.cache_dir",)


@dataclass(frozen=True)
class Inputs:
    """A run before it has ranks."""

    config: Config
    layout: Layout
    manifest: Manifest
    plan: Plan
    curriculum: Curriculum
    form: DictionaryForm

    def facts(self) -> dict[str, str]:
        """All that ranks must have in common: name -> value."""
        settings = {key: value for key, value in flatten(self.config).items() if key not in OWN_TO_A_RANK}
        layout = {f"launch.{key}": value for key, value in asdict(self.layout).items()}
        data = {"digest of the manifest at data.shards": self.manifest.digest}
        data["median_norm of the manifest at data.shards"] = str(self.manifest.median_norm)
        return {key: repr(value) for key, value in {**settings, **layout, **versions(), **data}.items()}


def read_inputs(config: Config, world: int | None = None) -> Inputs:
    """All refusals that need no other rank. `world`: launched processes; None: as few as the configuration can do with.

    Raises UserError or DataError, one line, for settings, data and launch that do not go together.
    """
    config = taken_over(config, launch_file())
    data = config.data
    manifest = Manifest.load(data.shards, allow_pipe=data.allow_pipe, retries=data.retries, timeout=data.timeout)
    config = begun(config, manifest)
    world = world or config.parallel.dictionary_ranks
    layout = config.parallel.resolve(world, config.dictionary.banks)
    config.optim.refuse_sharding(layout.zero_stage)
    if config.optim.accumulate > config.data.global_batch:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate} is more than the rows of a step, "
            f"data.global_batch={config.data.global_batch}; lower it"
        )
    plan = Plan(manifest, config.run.seed, config.data.global_batch, config.data.lanes, config.data.window)
    lanes_of_rank(config.data.lanes, 0, world // layout.dictionary_ranks)
    target = l0_target(config.dictionary, manifest.width)
    curriculum = Curriculum(config.stages, config.loss, config.optim, plan.steps_per_epoch, target)
    if config.dictionary.gate == "jumprelu" and config.dictionary.freeze == "none":
        raise UserError(
            "dictionary.gate=jumprelu: thresholds of single slots are not trained; hold the slots with "
            "dictionary.freeze=free"
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
    if "align" in curriculum.names and not manifest.concepts:
        raise UserError(
            "stage align needs labelled rows, but the manifest of data.shards names no concepts; "
            "drop the stage or extract with labels"
        )
    if config.data.unlabelled == "none" and config.loss.binding == "softmax":
        raise UserError(
            "data.unlabelled=none makes negatives of rows, and loss.binding=softmax counts none; "
            "set loss.binding=sigmoid or data.unlabelled=unknown"
        )
    form = config.dictionary.form(manifest.width, manifest.concepts, len(manifest.answers))
    return Inputs(config, layout, manifest, plan, curriculum, form)


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
