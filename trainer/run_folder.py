"""Names inside a run folder. Nothing else spells them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: what training and the tools write there."""

    path: Path

    @classmethod
    def around(cls, path: Path) -> "RunFolder":
        """The run folder that a path is, or that holds it as one of its checkpoints."""
        whole = path.absolute()
        return cls(whole.parents[1]) if whole.parent.name == "checkpoints" else cls(path)

    @property
    def name(self) -> str:
        """The folder's own name, which names the run elsewhere."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Figures by step, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """Updates that were not made, one JSON object a line."""
        return self.path / "skipped.jsonl"

    @property
    def outcome(self) -> Path:
        """How training ended."""
        return self.path / "outcome.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def live(self, source: str) -> Path:
        """Folder of the manifest of a source that is computed; source: its name, "" where there is one."""
        return self.path / "live" / (source or "rows")

    @property
    def mlflow_run_id(self) -> Path:
        """Id of the MLflow run that mirrors the figures."""
        return self.path / "mlflow_run_id"

    @property
    def tracking(self) -> Path:
        """What MLflow is to be told of the run besides its figures."""
        return self.path / "tracking.json"

    @property
    def evaluation(self) -> Path:
        """What `alignsae evaluate` found."""
        return self.path / "evaluation.json"

    @property
    def swap(self) -> Path:
        """What `alignsae swap` found."""
        return self.path / "swap.json"

    @property
    def summary(self) -> Path:
        """The figures that `alignsae summary` compares."""
        return self.path / "summary.json"

    @property
    def slot_pages(self) -> Path:
        """Folder of the pages of `alignsae explore`."""
        return self.path / "slot-pages"

    @property
    def report(self) -> Path:
        """The page of `alignsae report`."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """Folder of its pictures."""
        return self.path / "plots"
