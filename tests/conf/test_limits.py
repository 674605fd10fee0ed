"""Numbers that cannot be meant are refused before anything is loaded; all that is shipped passes."""

from typing import Any

import pytest

from lcm.composition import compose, plain
from lcm.errors import UserError
from lcm.limits import LIMITS, check_limits
from lcm.targets import CONF

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PROGRAMS = ["sample", "evaluate", "encode", "preview", "manifest", "bench"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_within(experiment: str) -> None:
    check_limits(plain(compose("train", [f"experiment={experiment}", "callbacks=best", "callbacks/keep=every"])))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_programs_defaults_are_within(program: str) -> None:
    check_limits(plain(compose(program, [])))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.batch_size", 0, "a whole number from 1"),
        ("data.batch_size", 2.5, "a whole number from 1"),
        ("data.num_workers", -1, "a whole number from 0"),
        ("data.caption_dropout", 1.5, "a number from 0 to 1"),
        ("model.clip_norm", 0, "a number above 0"),
        ("model.optimizer.lr", float("nan"), "a number from 0"),
        ("model.optimizer.lr", "abc", "a number from 0"),
        ("seed", -1, "a whole number from 0 to"),
        ("seed", True, "a whole number from 0 to 4294967295"),
        ("w", "abc", "a number"),
        ("trainer.devices", 0, "how many"),
        ("trainer.devices", "abc", "how many"),
        ("steps", [], "a whole number from 1, or several"),
        ("callbacks.samples.steps", [4, 0], "a whole number from 1, or several"),
    ],
)
def test_what_cannot_be_meant_is_refused(key: str, value: Any, expected: str) -> None:
    node = value
    for name in reversed(key.split(".")):
        node = {name: node}
    with pytest.raises(UserError) as caught:
        check_limits(node)
    assert str(caught.value).startswith(f"{key}={value}: expected {expected}")


@pytest.mark.parametrize("value", [1, None, [1, 2]])
def test_what_can_be_meant_passes(value: Any) -> None:
    check_limits({"steps": value, "samples": {"steps": value}, "dtype": None, "precision": 32})


@pytest.mark.parametrize("key", ["trainer.precision", "dtype"])
def test_a_choice_that_there_is_not_names_those_that_there_are(key: str) -> None:
    *_, name = key.split(".")
    with pytest.raises(UserError, match=f"{name}=8: choose among "):
        check_limits({name: 8})


def test_the_key_that_was_set_is_named_not_one_that_takes_its_value_from_it() -> None:
    with pytest.raises(UserError, match=r"^seed=abc"):
        check_limits(plain(compose("train", ["seed=abc"])))


def test_every_limit_is_of_a_key_that_there_is() -> None:
    """Or of one that an option adds (`+data.timeout=60`)."""

    def names(node: Any) -> set[str]:
        return {str(key) for key in node} | set().union(*map(names, node.values())) if isinstance(node, dict) else set()

    configs = [compose(program, []) for program in PROGRAMS]
    configs += [compose("train", [f"experiment={experiment}", "callbacks=best"]) for experiment in EXPERIMENTS]
    configs += [compose("train", ["experiment=lcd_sd15", "trainer=fsdp", "data=shards"])]
    known = set().union(*(names(plain(cfg)) for cfg in configs))
    assert set(LIMITS) <= known
