"""The parts of wandb and mlflow that are called, as small fakes that remember what they received."""

from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


class FakeWandb:
    """wandb; ``broken`` names the call at which the network is gone."""

    def __init__(self) -> None:
        self.runs: list[FakeWandbRun] = []
        self.broken = ""
        self.module = module("wandb", init=self.init, Settings=SimpleNamespace, Image=lambda array: array)

    def init(self, **begun: Any) -> "FakeWandbRun":
        self.fail("start")
        self.runs.append(FakeWandbRun(self, begun, begun["id"] or f"id-{len(self.runs)}"))
        return self.runs[-1]

    def fail(self, when: str) -> None:
        if self.broken == when:
            raise ConnectionError("network is gone")


@dataclass
class FakeWandbRun:
    owner: FakeWandb
    begun: dict[str, Any]
    id: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    steps_by: str = ""

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps_by = step_metric

    def log(self, line: dict[str, Any]) -> None:
        assert self.steps_by in line
        self.owner.fail("pictures" if any(name.startswith("pictures/") for name in line) else "log")
        self.lines.append(line)

    def finish(self, exit_code: int) -> None:
        self.owner.fail("finish")
        self.exit_code = exit_code


@dataclass
class FakeMLflowRun:
    name: str
    experiment: str
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int]] = field(default_factory=list)
    images: list[tuple[str, int]] = field(default_factory=list)


class FakeMLflow:
    """A server's memory, and the client that reaches it."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeMLflowRun] = {}
        self.experiments: dict[str, str] = {}
        self.uris: list[str] = []
        entities = module("mlflow.entities", Metric=lambda *parts: parts, Param=lambda *parts: parts)
        tracking = module("mlflow.tracking", MlflowClient=self.client)
        self.modules = {"mlflow": module("mlflow"), "mlflow.entities": entities, "mlflow.tracking": tracking}

    def client(self, tracking_uri: str) -> "FakeMLflow":
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        number = self.experiments.get(name)
        return None if number is None else SimpleNamespace(experiment_id=number)

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        assert name not in self.experiments
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: str) -> Any:
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = FakeMLflowRun(run_name, experiment)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        run = self.runs[run_id]
        run.metrics += [(key, value, step) for key, value, _, step in metrics]
        for key, value in params:
            # A server refuses to change what was once set.
            assert run.params.setdefault(key, value) == value

    def log_image(self, run_id: str, image: Any, key: str, step: int) -> None:
        self.runs[run_id].images.append((key, step))
