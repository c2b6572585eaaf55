"""Entry point of the `alignsae` command. A tool is two modules of one name: tools/parsers/NAME.py holds its help and
add_arguments(parser), tools/NAME.py holds run(args) and is imported when it runs: help needs no torch."""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import NoReturn

from trainer.errors import UserError
from trainer.redact import redact

# Subcommand -> module in tools/ and tools/parsers/, line of the help.
TOOLS = {
    "demo": ("demo", "the whole result in small, in ten minutes, in this folder"),
    "biographies": ("biographies", "generate the synthetic biography benchmark"),
    "ontology": ("ontology", "labelled prompts of a thousand concepts, from WordNet's nouns"),
    "finetune-lm": ("finetune_lm", "train or fine-tune a causal language model on prompts and texts"),
    "ask": ("ask", "what a language model knows: score its answers, keep the prompts that it answers"),
    "extract": ("extract", "write activations of a language model as tar shards"),
    "import": ("import_dictionary", "bring a dictionary that was trained elsewhere"),
    "gate": ("gate", "a threshold and a gain for a relu dictionary, without training"),
    "index": ("index", "build a manifest for shards written elsewhere"),
    "repack": ("repack", "turn one-vector WebDataset samples into blocks"),
    "verify": ("verify", "check every byte of a shard folder"),
    "evaluate": ("evaluate", "binding, fragmentation and reconstruction of a dictionary"),
    "swap": ("swap", "replace one concept by another in a running language model"),
    "steer": ("steer", "generate text with chosen concept slots set by hand"),
    "explore": ("explore", "pages about every slot: contexts, histogram, tokens, neighbours"),
    "report": ("report", "plots and one self-contained HTML page for a run"),
    "summary": ("summary", "collect a run's figures into summary.json and compare them with the bars"),
    "export": ("export", "write a dictionary for other programs, normalisation folded in"),
    "plan": ("plan", "memory and traffic per rank for a configuration, before anything is launched"),
    "bench": ("bench", "time the objective against its floor and against dense baselines"),
    "track": ("track", "bring MLflow level with the metrics.jsonl of runs"),
    "init": ("init", "write a configuration and a launch file to begin with"),
    "config": ("config", "every key of a configuration with its default and meaning"),
    "train": ("train", "train a dictionary on the ranks of a launch file"),
    "frontier": ("frontier", "FVU over L0 of gates and sparsities, with other trainers beside them"),
    "reproduce": ("reproduce", "a published experiment from its data to its tables, stage by stage"),
    "sweep": ("sweep", "run a grid of configurations and tabulate the results"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def version() -> str:
    """Of the package that is installed; "unknown" where only the files are there."""
    try:
        return importlib.metadata.version("alignsae")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """Parser of all subcommands; only `selected` gets its arguments."""
    parser = Parser(
        prog="alignsae",
        description="Concept-aligned sparse autoencoders: data, evaluation and interventions. "
        "Training is `alignsae train`, or `accelerate launch -m trainer.train --config configs/X.yaml key=value ...`.",
    )
    parser.add_argument("--version", action="version", version=f"alignsae {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in TOOLS.items():
        if name != selected:
            commands.add_parser(name, help=help_line, add_help=False)
            continue
        module = importlib.import_module(f"tools.parsers.{module_name}")
        sub = commands.add_parser(
            name, help=help_line, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
    return parser


def chosen_device(name: str | None) -> str:
    """The --device of a tool; None: CUDA where there is one, else the CPU. Raises UserError for one that torch does not
    know or that this machine does not have."""
    if name == "cpu":
        return name
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"--device {name} cannot be used here ({reason:.150}); use --device cpu") from error
    return name


def check_run(folder: Path | None) -> None:
    """Raise UserError for a --run that is no folder."""
    try:
        found = folder is None or folder.exists()
    except OSError:  # a name that no file system takes
        found = False
    if not found:
        raise UserError(f"--run {folder!s:.200}: there is no such folder; give the run.dir of a run that has trained")


def said_by_main(error: UserError) -> bool:
    """Whether another process of the same launch says it: one that all of them were told of together."""
    if os.environ.get("RANK", "0") == "0":
        return False
    from trainer.agreement import AgreedError

    return isinstance(error, AgreedError)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; bad input prints one line and returns 2."""
    argv = sys.argv[1:] if argv is None else argv
    selected = next((a for a in argv if not a.startswith("-")), None)
    try:
        if selected is not None and selected not in TOOLS:
            near = difflib.get_close_matches(selected, TOOLS, n=1, cutoff=0.0)[0]
            raise UserError(f"there is no command {selected!r}; the nearest is {near!r}, `alignsae --help` lists all")
        args = build_parser(selected).parse_args(argv)
        if "device" in args:
            args.device = chosen_device(args.device)
        check_run(getattr(args, "run_dir", None))
        tool = importlib.import_module(f"tools.{TOOLS[args.command][0]}")
        return int(tool.run(args) or 0)
    except UserError as error:
        if not said_by_main(error):
            print(f"alignsae: error: {redact(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `alignsae ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("alignsae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    from trainer.failures import exit_with

    exit_with(main())
