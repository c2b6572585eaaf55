"""One rank of a launched job: does each job of a list in one process group. Used by strategy_runs.run_jobs.

A job is {"config": path, "overrides": [...]}.
"""

import json
import sys
from pathlib import Path

from strategy_runs import forget_engine

from trainer import train


def main() -> int:
    """Run the jobs of the JSON file named on the command line, one after the other, until one fails."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print("job", *job["overrides"], flush=True)
        forget_engine()  # a user's process prepares one engine only
        if code := train.main(["--config", job["config"], *job["overrides"]]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
