"""One rank of a launched job: does each job of the list in one process group. Used by strategy_runs.launch.

A job is {"config": path, "overrides": [...]}.
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from trainer import train
from trainer.config import load_config


def main() -> None:
    """Run the jobs of the JSON file named on the command line, one after the other."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print("job", *job["overrides"], flush=True)
        AcceleratorState._reset_state()  # a user's process prepares one engine only
        train.run(load_config(job["config"], job["overrides"]))


if __name__ == "__main__":
    main()
