"""The README.md of a model on a hub: description, training, metrics, usage and limits."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf

from lcm.app.html_report import number, read_metrics
from lcm.models.loading import read_json
from lcm.models.pipeline import find, read_lcm_json
from lcm.runtime.environment import commit
from lcm.runtime.redaction import redacted

SETTINGS = (  # keys of config.yaml
    *("model.objective._target_", "model.solver._target_", "model.loss._target_", "model.optimizer._target_"),
    *("model.optimizer.lr", "model.ema_decay", "model.w_min", "model.w_max", "model.adapters.rank", "model.adapters.alpha"),
    *("data.resolution", "data.batch_size", "trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches"),
    *("trainer.precision", "seed"),
)


def write_card(folder: Path, run: Path, evaluation: Path | None) -> None:
    """Write `README.md` and its picture into the pipeline folder of a run.

    evaluation: the output folder of `lcm.evaluate` for this model.
    """
    config: Any = OmegaConf.load(run / "config.yaml")
    metadata, index = read_lcm_json(folder), read_json(folder / "model_index.json")
    base = str(config.model.pipeline)
    is_hub_id = not Path(base).expanduser().exists() and base.count("/") == 1
    license = base_license(base)
    data = ModelCardData(
        license=license,
        base_model=base if is_hub_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["latent-consistency", *(["lora"] if "rank" in metadata else [])],
    )
    picture = picture_of(run, folder)
    name, method = base if is_hub_id else Path(base).name, metadata.get("method", "this program")
    parts = [
        f"# {config.name}",
        f"A {index['_class_name']} of {name}, trained by {method} for {metadata.get('steps', 'unknown')} steps.",
        f"![Samples at the end of the training]({picture})" if picture else "",
        "## Use",
        usage(index["_class_name"], metadata),
        "## Training",
        table(("setting", "value"), [*settings(config), ("data", data_of(config)), ("commit", commit())]),
        "## Metrics",
        metrics(run, evaluation),
        "## Licence and limits",
        licence_text(license),
        "The model inherits the limits and the biases of its base model and of its data. It was not tested for safety.",
    ]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{redacted(text)}\n").save(folder / "README.md")


def base_license(base: str) -> str | None:
    """Return the licence in the base model's card, or None if there is no card on this machine."""
    card = find(base) / "README.md"
    license = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license") if card.is_file() else None
    return license if isinstance(license, str) else None


def licence_text(license: str | None) -> str:
    if license is not None:
        return f"The licence of the base model is {license}. Name that of the training data here before you publish the model."
    return "Name the licences of the base model and of the training data here before you publish the model."


def picture_of(run: Path, folder: Path) -> str | None:
    """Copy the last image grid of the training to `folder`, and return its name. Return None without a grid."""
    grids = sorted(run.glob("samples/step-*.png"))
    if not grids:
        return None
    shutil.copyfile(grids[-1], folder / "samples.png")
    return "samples.png"


def usage(class_name: str, metadata: dict[str, Any]) -> str:
    """Return a usage example in diffusers for this pipeline class."""
    steps = metadata.get("phases") or metadata.get("students", [4])[-1]
    if metadata["sampler"] == "ddim" and "students" not in metadata:
        arguments = "num_inference_steps=50, guidance_scale=7.5"
    elif class_name == "LatentConsistencyModelPipeline":
        arguments = f"num_inference_steps={steps}, guidance_scale=8.5"
    else:
        arguments = f"num_inference_steps={steps}, guidance_scale=1.0"
    return "\n".join(
        [
            *("```python", "from diffusers import DiffusionPipeline", ""),
            'pipeline = DiffusionPipeline.from_pretrained("<this folder>")',
            f'image = pipeline("a red apple", {arguments}).images[0]',
            "```",
        ]
    )


def settings(config: Any) -> list[tuple[str, str]]:
    """Return the main settings of the training. A `_target_` is shortened to its last name."""
    values = ((name, OmegaConf.select(config, name, throw_on_missing=False)) for name in SETTINGS)
    return [(name.removesuffix("._target_"), str(value).rpartition(".")[2] if name.endswith("_target_") else number(value))
            for name, value in values if value is not None]  # fmt: skip


def data_of(config: Any) -> str:
    """Return the last part of the data's path, so that the card holds no folder of this machine."""
    source = OmegaConf.select(config, "data.shards") or OmegaConf.select(config, "data.folder") or "unknown"
    names = [source] if isinstance(source, str) else list(source)
    return ", ".join("/".join(str(name).split("/")[-2:]) for name in names)


def metrics(run: Path, evaluation: Path | None) -> str:
    """Return the table of an evaluation and the last validation metrics of the run."""
    last = [(name, list(values)[-1], list(values.values())[-1])
            for name, values in read_metrics(run / "metrics.csv").items() if name.startswith("val/")]  # fmt: skip
    rows: list[tuple[str, ...]] = [(name, str(step), number(value)) for name, step, value in last]
    validation = table(("metric", "step", "value"), rows) if rows else ""
    measured = (evaluation / "table.md").read_text().strip() if evaluation is not None else ""
    return "\n\n".join(part for part in (measured, validation) if part) or "Not measured."


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
