"""Tasks of a few hundred weights, with data that is a pure function of the step."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.data.batch import BatchSource
from dalle.training.optimizers import OptimizerConfig
from dalle.training.settings import EngineConfig, LogConfig, TrainConfig
from dalle.training.task import Loss, Mean, Phase, Player, Task

BATCH = 8


class ToyData(Section, json_schema_extra=FIXED):
    train: str = "none"
    text_length: int = 4


class ToyRun(Section, json_schema_extra=FIXED):
    """The fields of a run that the loop reads, without the real data section."""

    task: Literal["toy"] = "toy"
    name: str = Field("toy", json_schema_extra=FREE)
    output: str = Field("runs", json_schema_extra=FREE)
    seed: int = 0
    model: dict[str, int] = {}
    data: ToyData = ToyData()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    engine: EngineConfig = EngineConfig()

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name


def toy_run(folder: str | Path, *, seed: int = 0, engine: dict | None = None, **train) -> ToyRun:
    settings = {"steps": 4, "batch_size": BATCH, "log_every": 2, "save_every": 2, **train}
    return ToyRun(output=str(folder), seed=seed, train=TrainConfig(**settings), engine=EngineConfig(**(engine or {})))


class ToyLoader(BatchSource):
    """Rank r of R gets rows r, r + R, ... of each global batch, as the real loader deals them."""

    def __init__(self, start: int = 0, rank: int = 0, world_size: int = 1, steps: int = 10**9):
        self.start, self.rank, self.world_size, self.steps = start, rank, world_size, steps
        self.identity = {"fingerprint": "toy"}

    def __iter__(self):
        for step in range(self.start, self.steps):
            rows = global_batch(step)[self.rank::self.world_size]
            yield {"x": rows, "key": [str(index) for index in range(len(rows))]}


def global_batch(step: int, size: int = BATCH) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(1000 + step))


class Block(nn.Module):
    def __init__(self, out: int = 1, dropout: float = 0.0):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, out)
        self.dropout = nn.Dropout(dropout)
        # strided as the weights of channels_last convolutions are: 3x3 and, contiguous by name only, 1x1
        self.head.weight.data = self.head.weight.data.t().contiguous().t()
        self.scale = nn.Parameter(torch.ones(16).as_strided((16, 1), (1, 16)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.second(hidden)) * self.scale[:, 0])

    def matrix_parameters(self) -> list[str]:
        return ["second.weight"]


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build()


class SingleTask(Task):
    """Regression to the mean of a row, by one player."""

    tokens_per_sample = 6

    def __init__(self, optimizer: OptimizerConfig | None = None, dropout: float = 0.0, couples: bool = False):
        model = seeded(lambda: Block(dropout=dropout))
        self.players = {"net": Player(model, optimizer or OptimizerConfig(lr=1e-2, weight_decay=0.1))}
        self.frozen = {}
        self.splits_batch = not couples
        self.phases = [Phase("fit", "net", self.fit)]

    def prepare(self, batch, networks, step):
        return {**batch, "target": batch["x"].mean(dim=1, keepdim=True)}

    def fit(self, networks, batch, step):
        loss = (networks["net"](batch["x"]).float() - batch["target"]).square().mean()
        return Loss(loss, {"error": loss.detach().sqrt()})

    def preview(self, networks, step):
        return {"grey": torch.full((3, 4, 6), 128, dtype=torch.uint8)}

    def validate(self, networks, batches):
        mean = Mean()
        for batch in batches:
            batch = self.prepare(batch, networks, 0)
            error = (networks.bare("net")(batch["x"]) - batch["target"]).square().mean()
            mean.add(error, len(batch["x"]))
        return {"error": mean}

    def export(self, folder, states):
        for name, state in states.items():
            save_file(state, Path(folder) / f"{name}.safetensors")


class PreviewTask(SingleTask):
    """Its preview does as sampling does: a part is called alone, and weights are read in no forward."""

    def preview(self, networks, step):
        net = networks.bare("net")
        net.second(torch.zeros(1, 16))
        assert net.second.weight.shape == (16, 16) and net.scale.shape == (16, 1)
        return super().preview(networks, step)


class GanTask(SingleTask):
    """A hinge GAN of two MLPs with an R1 penalty every second step; the last bias has no gradient from R1."""

    splits_batch = True
    tokens_per_sample = 0

    def __init__(self, optimizer: OptimizerConfig | None = None):
        optimizer = optimizer or OptimizerConfig(lr=1e-2, betas=(0.5, 0.9), clip=0.7, weight_decay=0.01)
        self.players = {"g": Player(seeded(lambda: Block(out=6)), optimizer),
                        "d": Player(seeded(lambda: Block(out=1)), optimizer)}
        self.frozen = {"half": seeded(lambda: nn.Linear(6, 6))}
        self.phases = [Phase("d", "d", self.d_loss), Phase("r1", "d", self.r1, every=2), Phase("g", "g", self.g_loss)]

    def prepare(self, batch, networks, step):
        return {**batch, "noise": networks["half"](batch["x"])}

    def d_loss(self, networks, batch, step):
        fake = networks["g"](batch["noise"])
        real_score, fake_score = networks["d"](batch["x"]), networks["d"](fake.detach())
        return Loss((1 - real_score).relu().mean() + (1 + fake_score).relu().mean())

    def r1(self, networks, batch, step):
        x = batch["x"].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(networks.penalty("d")(x).sum(), x, create_graph=True)
        return Loss(gradient.float().square().sum(dim=1).mean())

    def g_loss(self, networks, batch, step):
        return Loss(-networks["d"](networks["g"](batch["noise"])).mean())

    def validate(self, networks, batches):
        return {}


class PaintsOnceTask(GanTask):
    """The same GAN, whose fakes are painted once a step; both of its players' phases judge those."""

    def __init__(self, optimizer: OptimizerConfig | None = None, dropout: float = 0.0):
        super().__init__(optimizer)
        *others, g = self.phases
        self.phases = [*others, replace(g, ahead={"painted": self.paint})]
        self.players["g"].module.dropout.p = dropout

    def paint(self, networks, batch, step):
        return {"fakes": [networks["g"](batch["noise"])]}

    def d_loss(self, networks, batch, step):
        (fake,) = batch["painted"]["fakes"]
        return Loss((1 - networks["d"](batch["x"])).relu().mean() + (1 + networks["d"](fake)).relu().mean())

    def g_loss(self, networks, batch, step):
        return Loss(-networks["d"](batch["painted"]["fakes"][0]).mean())


class OftenTask(GanTask):
    """The generator moves twice in every second step."""

    def __init__(self, optimizer: OptimizerConfig | None = None):
        super().__init__(optimizer)
        self.phases = [*self.phases[:2], replace(self.phases[2], every=2, repeats=2)]


class OftenPaintsOnceTask(PaintsOnceTask):
    def __init__(self, optimizer: OptimizerConfig | None = None):
        super().__init__(optimizer)
        self.phases = [*self.phases[:2], replace(self.phases[2], every=2, repeats=2)]


class Normed(nn.Module):
    """Batch statistics of the input itself, which no weight changes."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class NormedTask(SingleTask):
    """One player with statistics of its own on every rank."""

    def __init__(self, optimizer: OptimizerConfig | None = None):
        super().__init__(optimizer)
        self.players = {"net": Player(seeded(Normed), self.players["net"].optimizer)}


class NanOnOneRank(SingleTask):
    """The last rank's loss is not a number in the second step; its gradient alone would not show it."""

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        if step == 1 and networks.rank == networks.world_size - 1:
            loss.total = loss.total + torch.tensor(float("nan"))
        return loss
