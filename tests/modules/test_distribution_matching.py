"""Distribution matching: turns of student and fake score, exact resume, training on captions alone, a student's teacher."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector as vector
from torch.utils.data import DataLoader

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.models.pipeline import load_network
from lcm.modules.distribution_matching import MatchingModule, teacher_of
from tests.modules.conftest import new_module
from tests.modules.test_adversary import ADVERSARY

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")
REAL = partial(ADVERSARY, real="data")
ADAPTERS = {"adapters": {"rank": 4}}


def updates(module: MatchingModule) -> tuple[set[int], set[int]]:
    """Return how often the student's optimizer and the fake score's optimizer have updated each weight."""
    optimizers: Any = (module.optimizers().optimizer, module.fake.optimizer)
    student, fake = ({int(state["step"]) for state in optimizer.state.values()} for optimizer in optimizers)
    return student, fake


@pytest.mark.parametrize(("kind", "options"), [("tdm", {}), ("dmd2", {}), ("tdm", ADAPTERS)])
def test_student_learns_every_second_step_and_the_fake_score_in_each(
    kind: str, options: dict[str, Any], training: Make, data: Make, fit: Make
) -> None:
    training = partial(training, **options)
    module = training(kind, eval_ema=0.5)
    student, fake, teacher = (vector(n.parameters()).clone() for n in (module.net, module.fake, module.frozen["teacher"]))
    fit(module, data(), 1)
    assert torch.equal(vector(module.net.parameters()), student)
    assert torch.equal(vector(module.ema_net.parameters()), student)
    assert not torch.equal(vector(module.fake.parameters()), fake)

    two, three = training(kind, eval_ema=0.5), training(kind, eval_ema=0.5)
    for module, steps in ((two, 2), (three, 3)):
        fit(module, data(), steps)
    assert not torch.equal(vector(two.net.parameters()), vector(two.ema_net.parameters()))
    for name in ("net", "ema_net"):  # the third step updates neither the student nor its average
        assert torch.equal(*(vector(getattr(module, name).parameters()) for module in (two, three)))

    module = training(kind, eval_ema=0.5)
    fit(module, data(), 4)
    assert updates(module) == ({2}, {4})
    assert not torch.equal(vector(module.net.parameters()), student)
    assert not torch.equal(vector(module.ema_net.parameters()), student)
    assert torch.equal(vector(module.frozen["teacher"].parameters()), teacher)
    assert all(p.grad is None for p in module.fake.parameters())


def test_turns_follow_updates_and_not_batches(training: Make, data: Make, fit: Make) -> None:
    module = training("dmd2")
    assert fit(module, data(), 4, accumulate_grad_batches=3).global_step == 4
    assert updates(module) == ({2}, {4})


@pytest.mark.parametrize(
    ("kind", "options"), [("tdm", {}), ("tdm", ADAPTERS), ("dmd2", {"adversary": REAL, "eval_ema": 0.5, **ADAPTERS})]
)
def test_resume_between_turns_is_exact(
    kind: str, options: dict[str, Any], training: Make, data: Make, fit: Make, tmp_path: Path
) -> None:
    whole, resumed = training(kind, **options), training(kind, **options)
    fit(whole, data(), 6)
    fit(training(kind, **options), data(), 3).save_checkpoint(tmp_path / "3.ckpt")
    fit(resumed, data(), 6, ckpt_path=tmp_path / "3.ckpt")
    assert updates(resumed) == updates(whole) == ({3}, {6})
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert len(checkpoint["optimizer_states"]) == 2 + ("adversary" in options)


@pytest.mark.parametrize("adversary", [None, REAL])
def test_only_the_adversary_looks_at_images(adversary: Any, training: Make, fit: Make, batch: LatentBatch) -> None:
    weights = []
    for z0 in (batch.z0, torch.randn_like(batch.z0)):
        module = training("dmd2", adversary=adversary)
        fit(module, DataLoader([replace(batch, z0=z0)] * 4, batch_size=None), 4)
        weights.append(vector(module.net.parameters()).detach())
    assert torch.equal(*weights) == (adversary is None)


def test_each_loss_has_gradients_of_its_own_adapters(training: Make, batch: LatentBatch) -> None:
    module = training("tdm", **ADAPTERS)
    objective, nets = module.objective, module.denoisers(module.net)
    draws = objective.draw(batch.z0, torch.Generator().manual_seed(0))

    def trained() -> set[str]:
        names = {name for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
        return names

    sample = objective.sample(nets.online, batch, draws)
    module.fake.configure(1)
    module.fake.learn(lambda: objective.score_loss(nets.fake, batch, draws, sample.detach()))
    fake_names = trained()
    loss, _ = objective.distances(objective.pair_with_target(nets, batch, draws, sample))
    loss.backward()
    student_names = trained()
    assert fake_names | student_names == set(module.state_dict())
    assert {name.partition(".")[0] for name in fake_names} == {"fake"}
    assert {name.partition(".")[0] for name in student_names} == {"net"}


def test_starts_from_a_student_with_its_teacher(tiny_pipeline: Path, data: Make, fit: Make, tmp_path: Path) -> None:
    distilled = new_module(tiny_pipeline, "distillation")
    fit(distilled, data(), 2)
    distilled.save_model(student := str(tmp_path / "student"))
    module = new_module(Path(student), "dmd2")
    assert torch.equal(vector(module.net.parameters()), vector(load_network(student).parameters()))
    original = vector(load_network(tiny_pipeline).parameters())
    assert torch.equal(vector(module.frozen["teacher"].parameters()), original)
    assert module.fake.network.time_embedding.cond_proj.weight.abs().sum() == 0  # the teacher, with a new input for w
    fit(module, data(), 2)
    module.save_model(again := str(tmp_path / "again"))
    assert (teacher_of(student), teacher_of(again)) == (str(tiny_pipeline), str(tiny_pipeline))
    metadata = json.loads((tmp_path / "again/lcm.json").read_text())
    assert (metadata["phases"], metadata["w_min"], metadata["w_max"]) == (4, 2.0, 14.0)
    assert not any("fake" in path.name for path in (tmp_path / "again").rglob("*"))


def test_unknown_teacher_and_target_are_one_sentence(tiny_pipeline: Path, data: Make, fit: Make, tmp_path: Path) -> None:
    distilled = new_module(tiny_pipeline, "distillation")
    distilled.save_model(str(tmp_path / "student"))
    metadata = json.loads((tmp_path / "student/lcm.json").read_text())
    for content, sentence in (
        ({**metadata, "pipeline": "/nowhere"}, r"cannot be found: set model\.teacher="),
        ({"sampler": "consistency"}, r"names no teacher: set model\.teacher="),
    ):
        (tmp_path / "student/lcm.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence):
            new_module(tmp_path / "student", "dmd2")
        new_module(tmp_path / "student", "dmd2", teacher=str(tiny_pipeline))
    with pytest.raises(UserError, match=r"set model\.adversary\.real=data"):
        new_module(tiny_pipeline, "tdm", adversary=ADVERSARY)
    with pytest.raises(UserError, match=r"takes w as an input.*: set model\.adapters=null"):
        new_module(tmp_path / "student", "dmd2", teacher=str(tiny_pipeline), **ADAPTERS)
