"""Entry point of the `alignsae` command. A tool is a module with HELP, add_arguments(parser) and run(args)."""

import argparse
import importlib
import sys

from trainer.errors import UserError

# Subcommand -> module; modules are imported only when called, so that --help stays fast.
TOOLS = {
    "biographies": ("tools.biographies", "generate the synthetic biography benchmark"),
    "finetune-lm": ("tools.finetune_lm", "train or fine-tune a causal language model on prompts and texts"),
    "extract": ("tools.extract", "write activations of a language model as tar shards"),
    "index": ("tools.index", "build a manifest for shards written elsewhere"),
    "repack": ("tools.repack", "turn one-vector WebDataset samples into blocks"),
    "verify": ("tools.verify", "check every byte of a shard folder"),
    "evaluate": ("tools.evaluate", "binding, fragmentation and reconstruction of a dictionary"),
    "swap": ("tools.swap", "replace one concept by another in a running language model"),
    "steer": ("tools.steer", "generate text with chosen concept slots set by hand"),
    "report": ("tools.report", "plots and one self-contained HTML page for a run"),
    "summary": ("tools.summary", "collect a run's figures into summary.json and compare them with the bars"),
    "export": ("tools.export", "write a dictionary for other programs, normalisation folded in"),
    "plan": ("tools.plan", "memory and traffic per rank for a configuration, before anything is launched"),
    "bench": ("tools.bench", "time the objective against its floor and against dense baselines"),
    "track": ("tools.track", "bring MLflow level with the metrics.jsonl of runs"),
    "sweep": ("tools.sweep", "run a grid of configurations and tabulate the results"),
}


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """Parser of all subcommands; only `selected` gets its arguments (and its imports)."""
    parser = argparse.ArgumentParser(
        prog="alignsae",
        description="Concept-aligned sparse autoencoders: data, evaluation and interventions. "
        "Training itself is `accelerate launch -m trainer.train --config configs/X.yaml key=value ...`.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in TOOLS.items():
        if name != selected:
            commands.add_parser(name, help=help_line, add_help=False)
            continue
        module = importlib.import_module(module_name)
        sub = commands.add_parser(
            name, help=help_line, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; bad input prints one line and returns 2."""
    argv = sys.argv[1:] if argv is None else argv
    selected = next((a for a in argv if not a.startswith("-")), None)
    try:
        args = build_parser(selected).parse_args(argv)
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"alignsae: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignsae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
