"""Graphs compute the same values as torch, also at sizes that the trace did not use. optimum opens their folders."""

import gc
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcm.core.errors import UserError
from lcm.models import graphs
from lcm.models.pipeline import find, load_codec, load_family, load_network
from lcm.models.text_to_image import TextToImage
from tests.models.conftest import save_student

openvino = pytest.importorskip("openvino")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def student(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "student"
    save_student(folder, tiny_pipeline)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps conversions for all tests."""
    return tmp_path_factory.mktemp("home")


def outputs(folder: Path, form: str, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Run a graph as optimum does, and return its outputs by name."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    file = folder / graphs.FILES[form]
    if form == "onnx":
        session = onnxruntime.InferenceSession(file)
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, arrays), strict=True))
    results = graphs.openvino_core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)
    return {output.get_any_name(): value for output, value in results.to_dict().items()}


@pytest.mark.parametrize(("kind", "form"), [("student", "openvino"), ("xl", "onnx")])
def test_graphs_compute_what_torch_computes(kind: str, form: str, student: Path, xl_pipeline: Path, tmp_path: Path) -> None:
    source = student if kind == "student" else xl_pipeline
    graphs.write_graphs(source, tmp_path / "graphs", form)
    codec, net = load_codec(source), load_network(source).eval()
    z = torch.randn(3, 4, 12, 8)
    cond, _ = codec.conditions(["cat", "dog", "red apple"], z)
    inputs = {"sample": z, "timestep": torch.tensor(321.0), "encoder_hidden_states": cond["states"]}
    w, added = None, None
    if kind == "student":
        inputs["timestep_cond"] = w = torch.randn(3, net.config["time_cond_proj_dim"])
    else:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"].float()}
    with torch.no_grad():
        expected = net(z, 321, cond["states"], timestep_cond=w, added_cond_kwargs=added, return_dict=False)[0]
        [(name, value)] = outputs(tmp_path / "graphs/unet", form, inputs | (added or {})).items()
        assert name == "out_sample"
        assert np.abs(value - expected.numpy()).max() < 1e-4
        decoded = outputs(tmp_path / "graphs/vae_decoder", form, {"latent_sample": z})["sample"]
        assert np.abs(decoded - codec.vae.decode(z).sample.numpy()).max() < 1e-4
        x = torch.randn(1, 3, 32, 48)
        moments = outputs(tmp_path / "graphs/vae_encoder", form, {"sample": x})["latent_parameters"]
        assert np.abs(moments - codec.vae.encode(x).latent_dist.parameters.numpy()).max() < 1e-4
        for tower, encoder in zip(load_family(source).towers, codec.text.encoders, strict=True):
            ids = torch.randint(2, 50, (3, 16))
            states = encoder(ids, output_hidden_states=True)
            values = outputs(tmp_path / "graphs" / tower.encoder, form, {"input_ids": ids})
            first = "text_embeds" if tower.encoder == "text_encoder_2" else "last_hidden_state"
            assert next(iter(values)) == first
            assert np.abs(values[first] - states[0].numpy()).max() < 1e-4
            assert np.abs(values["hidden_states.0"] - states.hidden_states[0].numpy()).max() < 1e-4
    assert json.loads((tmp_path / "graphs/vae_decoder/config.json").read_text())["scaling_factor"]
    with pytest.raises(UserError, match="holds graphs for optimum: give the pipeline that they were made from"):
        find(str(tmp_path / "graphs"))


def test_openvino_draws_the_same_images(student: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "HF_HOME", str(home))
    model, graph = TextToImage.load(str(student)), TextToImage.load(str(student), engine="openvino")
    with monkeypatch.context() as context:
        context.setattr(graphs, "to_openvino", None)  # the conversion is stored
        graph = TextToImage.load(str(student), engine="openvino")
    assert model.identity() != graph.identity()
    monkeypatch.setattr(graph.net, "conv_in", None)  # torch cannot compute the network
    options: dict[str, Any] = {"steps": 2, "w": 3.0, "size": [48, 32]}
    for prompts in (["cat"], ["cat", "dog"]):
        [ours], [theirs] = (list(m.images(prompts, [0, 1][: len(prompts)], **options)) for m in (model, graph))
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_another_model_is_converted_anew(student: Path, tiny_pipeline: Path, home: Path, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "HF_HOME", str(home))
    for pipeline in (student, tiny_pipeline):
        TextToImage.load(str(pipeline), engine="openvino")
    assert len([path for path in (home / "openvino").iterdir() if path.is_dir()]) == 3  # the VAE is the same


def test_signals_arrive_after_models_are_deleted(student: Path) -> None:
    """A signal crashes the process if the main thread has a freed signal stack."""
    models = [TextToImage.load(str(student), engine="openvino") for _ in range(2)]
    models.pop(0)
    gc.collect()
    models.clear()
    gc.collect()
    arrived: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: arrived.append(signum))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert arrived == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "device=cuda has no effect on engine=openvino"),
        ({"compile": True}, "compile=true has no effect on engine=openvino"),
        ({"dtype": torch.float16}, "computes in float32 or bfloat16"),
        ({"pipeline": "pixart"}, "engine=openvino is for Stable Diffusion 1, 2 and XL, and this is a PixArtAlphaPipeline"),
    ],
)
def test_options_without_effect_on_openvino_are_refused(
    options: dict[str, Any], says: str, student: Path, pixart_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcm.models.text_to_image.check_compiler", lambda option: None)
    pipeline = pixart_pipeline if options.pop("pipeline", None) else student
    with pytest.raises(UserError, match=says):
        TextToImage.load(str(pipeline), engine="openvino", **options)


@pytest.mark.parametrize(("package", "form"), [("optimum.onnxruntime", "onnx"), ("optimum.intel", "openvino")])
def test_optimum_draws_the_same_images(package: str, form: str, student: Path, tmp_path: Path) -> None:
    """This test runs only where optimum is installed. optimum needs older versions of diffusers and transformers."""
    optimum = pytest.importorskip(package)
    from diffusers import LatentConsistencyModelPipeline

    graphs.write_graphs(student, tmp_path / "graphs", form)
    name = f"{'ORT' if form == 'onnx' else 'OV'}LatentConsistencyModelPipeline"
    exact = {} if form == "onnx" else {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    theirs = getattr(optimum, name).from_pretrained(tmp_path / "graphs", **exact)
    images = []
    for pipeline in (LatentConsistencyModelPipeline.from_pretrained(student), theirs):
        rng, latents = torch.Generator().manual_seed(0), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        images.append(pipeline("cat", latents=latents, num_inference_steps=2, generator=rng, output_type="np").images)
    assert np.abs(images[0] - images[1]).max() < 3 / 255  # two grey levels of 255
