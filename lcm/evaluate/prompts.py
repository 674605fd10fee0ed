"""The prompts of an evaluation: those of the shards, of a file, or of COCO's captions."""

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lcm.app.inputs import read_prompts
from lcm.core.errors import UserError
from lcm.data.captions import read_captions
from lcm.data.source import Source


def make_prompts(cfg: DictConfig, cache: Any) -> tuple[list[str], int]:
    """Return `samples` prompts, repeated if there are fewer, and the number of prompts before repetition.

    `per_prompt` is the number of images of each prompt. Raise UserError for too few prompts, and for prompts whose SHA-256 is
    not `prompts_sha256`.
    """
    is_coco = isinstance(cfg.prompts, str) and cfg.prompts.lower().endswith(".json")
    if cfg.prompts_seed is not None and not is_coco:
        raise UserError("prompts_seed chooses among COCO's captions: set prompts=<captions_val2014.json>, or leave it out")
    if cfg.per_prompt is not None and cfg.samples % cfg.per_prompt:
        raise UserError(f"samples={cfg.samples} is not a multiple of per_prompt={cfg.per_prompt}: change one of them")
    needed = cfg.samples // (cfg.per_prompt or 1)
    if is_coco:
        prompts = read_coco(cfg.prompts, cfg.prompts_seed or 0)
    else:
        prompts = read_prompts(cfg.prompts, lambda: read_captions(Source.from_option(cfg, "shards", cache), needed))
    if not prompts:
        raise UserError(f"there are no captions in prompts={cfg.prompts} (shards={cfg.shards}): give others")
    if cfg.per_prompt is not None and len(prompts) < needed:
        raise UserError(
            f"prompts={cfg.prompts} has {len(prompts)} prompts, but samples={cfg.samples} with per_prompt={cfg.per_prompt} "
            f"need {needed}: give more prompts, or set samples={len(prompts) * cfg.per_prompt}"
        )
    prompts = prompts[:needed]
    if cfg.prompts_sha256 not in (None, sha256_of(prompts)):
        raise UserError(
            f"the SHA-256 of the {len(prompts)} prompts is {sha256_of(prompts)}, not prompts_sha256={cfg.prompts_sha256}: give "
            "the prompts, prompts_seed and samples of the evaluation that you compare with"
        )
    return [prompts[i % len(prompts)] for i in range(cfg.samples)], len(prompts)


def sha256_of(prompts: list[str]) -> str:
    """Return the SHA-256 of the file prompts.txt: the prompts in UTF-8, each ended by a newline."""
    return hashlib.sha256(as_lines(prompts).encode()).hexdigest()


def as_lines(prompts: list[str]) -> str:
    return "".join(f"{prompt}\n" for prompt in prompts)


def read_coco(file: str, seed: int) -> list[str]:
    """Return one caption of each image of COCO's `captions_*.json`, in an order that depends on the seed. Raise UserError.

    Images are sorted by the SHA-256 of "<seed>/<image id>". The caption of an image has the smallest SHA-256 of
    "<seed>/<annotation id>". White space is reduced to single blanks. The result does not depend on the order in the file, nor
    on a version of Python or numpy.
    """

    def rank(number: int) -> bytes:
        return hashlib.sha256(f"{seed}/{number}".encode()).digest()

    try:
        annotations = json.loads(Path(file).expanduser().read_bytes())["annotations"]
        captions: dict[int, list[tuple[bytes, str]]] = {}
        for row in annotations:
            captions.setdefault(int(row["image_id"]), []).append((rank(int(row["id"])), " ".join(row["caption"].split())))
    except FileNotFoundError:
        raise UserError(
            f"there is no caption file {file}: it is in COCO's annotations_trainval2014.zip or annotations_trainval2017.zip; "
            "put it there, or set prompts=<file>"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no caption file of COCO ({type(error).__name__}: {error}): expected 'annotations', each with image_id, "
            "id and caption"
        ) from error
    return [min(captions[image])[1] for image in sorted(captions, key=rank)]
