"""A test of many cases fails after the last one, and names those that failed."""

import os
from pathlib import Path

import pytest

from tests.cases import each


def test_every_failed_case_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @each("high", [1, 2])
    @each(("low", "text"), [(0, "a"), (3, "b"), (4, "b")], ids=["first", "second", "third"])
    def test(low: int, text: str, high: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "CASE" not in os.environ
        monkeypatch.setenv("CASE", text)
        seen.append(tmp_path)
        assert list(tmp_path.iterdir()) == []
        if low == 4:
            pytest.fail("four")
        assert low < high

    with pytest.raises(BaseExceptionGroup, match=r"2 of 2 cases failed: 1; 2") as caught:
        test(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert len(set(seen)) == 6
    assert "CASE" not in os.environ
    for group in caught.value.exceptions:
        assert isinstance(group, BaseExceptionGroup)
        assert "2 of 3 cases failed: second; third" in str(group)
        assert group.exceptions[0].__notes__ == ["case 1: second"]
