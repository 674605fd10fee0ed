"""The InceptionV3 backbone matches torch-fidelity. A missing package or weight file is an error."""

import sys
from types import ModuleType

import pytest
import torch

from lcm.core.errors import UserError
from lcm.evaluate import inception


@pytest.fixture
def installed(monkeypatch):
    if "torch_fidelity" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))


def test_missing_package_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install"):
        inception.check("weights.pth")


def test_missing_weights_error(installed, tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/w.pth: get {inception.FILE} .* put it there"):
        inception.check(str(tmp_path / "w.pth"))


def test_features_match_torch_fidelity(tmp_path, monkeypatch):
    fidelity, file = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3"), tmp_path / "w.pth"
    torch.manual_seed(0)
    torch.save({}, file)
    with monkeypatch.context() as patch:  # the constructor loads a file, so the test saves random weights
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(fidelity.FeatureExtractorInceptionV3("random", ["2048"], str(file)).state_dict(), file)
    theirs = fidelity.FeatureExtractorInceptionV3("random", ["2048"], str(file))
    plain, smooth = (inception.InceptionBackbone(str(file), antialias=antialias) for antialias in (False, True))
    small, large = (torch.randint(0, 256, (1, 3, size, size)).byte() for size in (64, 400))
    torch.testing.assert_close(plain(small), theirs(small)[0])
    torch.testing.assert_close(plain(large), theirs(large)[0])
    assert smooth(large).shape == (1, smooth.num_features)
    assert not torch.allclose(smooth(large), plain(large))
