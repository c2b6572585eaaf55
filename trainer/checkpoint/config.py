"""Configuration of checkpoints."""

from dataclasses import dataclass

from trainer.errors import UserError

MOST = 1 << 50  # steps, or folders


@dataclass
class CheckpointConfig:
    """When and how to save, how many to keep, and where to resume from."""

    every: int = 1000  # steps between saves; 0 = only at the end
    keep: int = 2  # verified checkpoints kept
    # Figure of the held-out rows, as metrics.jsonl names it (heldout/fvu), whose best evaluation is saved and kept too.
    best: str | None = None
    resume: str = "auto"  # auto: the newest of this run that verifies | none | a checkpoint or run folder
    asynchronous: bool = True  # copy first, write while training goes on; the last save always waits
    on_error: str = "continue"  # continue: a save that fails is reported and the run goes on | stop

    def validate(self) -> None:
        """Raise UserError for a value that cannot be."""
        if not 0 <= self.every <= MOST:
            raise UserError(f"checkpoint.every={self.every} must be between 0 and {MOST}; 0 saves only at the end")
        if not 1 <= self.keep <= MOST:
            raise UserError(f"checkpoint.keep={self.keep} must be between 1 and {MOST}")
        if not self.resume:
            raise UserError("checkpoint.resume is empty; use auto, none, or the folder of a checkpoint or run")
        if self.on_error not in ("continue", "stop"):
            raise UserError(f"checkpoint.on_error={self.on_error!r} is unknown; use continue or stop")
