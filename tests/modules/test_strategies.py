"""Two processes under DDP or FSDP2 train like one process with the same global batch.

The processes train in float32 on the CPU over gloo.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm.bench import memory
from lcm.models.pipeline import load_network
from tests.e2e import warm
from tests.e2e.conftest import environment
from tests.modules.conftest import new_module
from tests.modules.ranks import ADVERSARY, RANKS, SCENARIOS, SHAPES, train
from tests.modules.test_autoencoder import train as train_autoencoder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]
# Tolerances of weights. Four steps move a weight by up to 4e-3. The order of sums differs, and differs more with another batch
# size. AdamW magnifies the difference for gradients near zero.
RANKS_APART, SIZES_APART = 2e-6, 2e-5
Result = dict[str, Any]


@pytest.fixture(scope="module")
def pipelines(tiny_pipeline: Path, pixart_pipeline: Path, sd3_pipeline: Path) -> dict[str, Path]:
    return {"tiny": tiny_pipeline, "pixart": pixart_pipeline, "sd3": sd3_pipeline}


@pytest.fixture(scope="module")
def folder(pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every scenario in two processes, once for all xdist workers, and return the folder of the results."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "trained").exists():
            train_all(pipelines, folder)
            (folder / "trained").touch()
    return folder


def train_all(pipelines: dict[str, Path], folder: Path) -> None:
    train = [sys.executable, "-m", "tests.modules.ranks", *(str(pipelines[name]) for name in SHAPES), str(folder)]
    for done in warm.ranks(RANKS, train, folder, environment(), timeout=1800):
        assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture
def result(folder: Path) -> Any:
    """`result(name, rank=0)` returns the result of a scenario on a rank."""
    return lambda name, rank=0: torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.fixture
def alone(pipelines: dict[str, Path], tmp_path: Path) -> Any:
    """`alone(kind, name="tiny", **options)` trains on the same batches and draws in this process."""
    return lambda kind, name="tiny", **options: train(pipelines[name], kind, tmp_path / "alone", of=name, **options)


def assert_close(result: Result, expected: Result, atol: float = RANKS_APART) -> None:
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(
            result["weights"][name], value, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("kind", "accumulate"), [("distillation", 1), ("diffusion", 2)])
def test_two_ranks_train_as_one_process(kind: str, accumulate: int, result: Any, alone: Any) -> None:
    expected = alone(kind, accumulate=accumulate)
    assert min(expected["norms"]) > 0.05, "clipping is not active"
    for strategy in ("ddp", "fsdp"):
        ranks = [result(f"{kind}-{strategy}-{accumulate}", rank) for rank in range(RANKS)]
        losses = [sum(step) / RANKS for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
        assert losses == pytest.approx(expected["losses"], rel=1e-4)
        assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for rank in ranks:
            assert_close(rank, expected, SIZES_APART)


def test_every_network_is_sharded(result: Any, tiny_pipeline: Path) -> None:
    ddp, first, second = result("distillation-ddp-1"), result("distillation-fsdp-1"), result("distillation-fsdp-1", 1)
    for name in ("net", "target_net", "teacher"):
        assert first["sizes"][name] <= 0.52 * ddp["sizes"][name]
        assert second["sizes"][name] <= 0.52 * ddp["sizes"][name]
    assert first["sizes"]["net"] == memory.FLOAT32 * memory.shares(new_module(tiny_pipeline, "distillation").net, RANKS)[0]
    assert result("hsdp")["sizes"]["net"] == ddp["sizes"]["net"]


@pytest.mark.parametrize("of", ["pixart", "sd3"])
def test_sharded_transformer_equals_one_process(of: str, result: Any, alone: Any, folder: Path) -> None:
    expected, ranks = alone("distillation", of), [result(f"{of}-fsdp", rank) for rank in range(RANKS)]
    losses = [sum(step) / RANKS for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for rank in ranks:
        assert_close(rank, expected, SIZES_APART)
    for name in ("net", "target_net", "teacher"):
        held = [rank["sizes"][name] for rank in ranks]
        assert sum(held) == expected["sizes"][name]
        assert max(held) < 0.6 * expected["sizes"][name]
    saved = load_network(str(folder / f"{of}-fsdp/model"))
    for name, value in saved.state_dict().items():
        assert torch.equal(value, ranks[0]["weights"][f"net.{name}"]), name


@pytest.mark.parametrize(("of", "scenarios"), [("tiny", ["adversary-ddp", "adversary-fsdp"]), ("pixart", ["adversary-pixart"])])
def test_two_ranks_train_an_adversary_as_one_process(of: str, scenarios: list[str], result: Any, alone: Any) -> None:
    expected = alone("pcm", of, adversary=ADVERSARY)
    assert any(name.startswith("adversary.") for name in expected["weights"])
    for name in scenarios:
        for rank in (result(name, rank) for rank in range(RANKS)):
            assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
            assert_close(rank, expected, SIZES_APART)


@pytest.mark.parametrize(("kind", "name"), [("tdm", "matching-ddp"), ("tdm", "matching-adapters"), ("dmd2", "matching-fsdp")])
def test_two_ranks_match_distributions_as_one_process(kind: str, name: str, result: Any, alone: Any) -> None:
    """The ranks update the student in the same steps as one process."""
    expected = alone(kind, **{key: SCENARIOS[name][key] for key in ("adversary", "adapters") if key in SCENARIOS[name]})
    assert [norm > 0 for norm in expected["norms"]] == [False, True, False, True]
    for rank in (result(name, rank) for rank in range(RANKS)):
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        assert_close(rank, expected, SIZES_APART)


def test_shards_of_all_optimizers_are_resumed(result: Any) -> None:
    straight, resumed = result("matching-fsdp")["weights"], result("resumed-matching")["weights"]
    assert {name.partition(".")[0] for name in straight} == {"net", "fake", "adversary"}
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


@pytest.mark.parametrize("name", ["hsdp", "recomputed"])
def test_hsdp_and_recomputation_change_nothing(name: str, result: Any) -> None:
    assert_close(result(name), result("distillation-ddp-1"))


def test_mixed_precision_stays_near(result: Any) -> None:
    mixed, full = result("bf16"), result("distillation-fsdp-1")
    assert mixed["losses"] == pytest.approx(full["losses"], rel=0.1)
    assert mixed["losses"] != full["losses"]
    assert all(value.dtype == torch.float32 for value in mixed["weights"].values())


def test_non_finite_gradient_stops_both_ranks(result: Any) -> None:
    """Only the batch of rank 1 in step 2 is non-finite."""
    for rank in range(RANKS):
        assert "non-finite at step 2" in result("poisoned", rank)["stopped"]
        assert_close(result("poisoned", rank), result("half-ddp"))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("resumed-") and "matching" not in name])
def test_resume_under_another_strategy(name: str, result: Any) -> None:
    assert_close(result(name), result("distillation-ddp-1"))
    _, strategy, writer = name.split("-")
    if strategy == writer:  # a resume under the same strategy is exact to the bit
        straight = result("distillation-fsdp-1")["weights"]
        assert all(torch.equal(value, straight[key]) for key, value in result(name)["weights"].items())


@pytest.mark.parametrize("checkpoint", ["half-fsdp.ckpt", "half-folder.ckpt"])
def test_one_process_resumes_rank_checkpoints(checkpoint: str, folder: Path, result: Any, alone: Any) -> None:
    assert_close(alone("distillation", resume=folder / checkpoint), result("distillation-ddp-1"), SIZES_APART)


def test_two_ranks_train_the_autoencoder_as_one_process(folder: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The autoencoder has an adversary and a perceptual term."""
    train_autoencoder(tiny_pipeline, tmp_path / "one")
    files = tmp_path / "one.0", *(folder / f"autoencoder.{rank}" for rank in range(RANKS))
    expected, first, second = (torch.load(file, weights_only=True) for file in files)
    assert any(name.startswith("adversary.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-5, msg=name)  # three steps move a weight by 4e-3


@pytest.mark.parametrize(("name", "kind"), [("nf4 base", "lora"), ("nf4 teacher", "distillation")])
def test_quantised_layers_under_ddp(name: str, kind: str, result: Any, alone: Any) -> None:
    assert_close(result(name), alone(kind, quantization=SCENARIOS[name]["quantization"]), SIZES_APART)
    assert_close(result(name, 1), result(name), 0.0)


def test_ranks_agree_on_8_bit_moments(result: Any) -> None:
    # One process differs more, because rounded moments magnify the effect of the order of sums.
    assert_close(result("8-bit", 1), result("8-bit"), 0.0)


@pytest.mark.parametrize(("name", "says"), [("nf4 shards", "quantised layers"), ("8-bit shards", "bitsandbytes' optimizers")])
def test_shards_are_neither_quantised_nor_updated_in_8_bits(name: str, says: str, result: Any) -> None:
    assert result(name)["stopped"].startswith(says)
    assert result(name)["losses"] == []
