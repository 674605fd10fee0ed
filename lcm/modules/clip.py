"""CLIP (2103.00020): the image and text towers behind a pipeline's text encoder and the mini metrics."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lcm.core.numbers import Positive, Seed, Whole
from lcm.models.saving import save_clip
from lcm.modules.checkpoint import check_tensors
from lcm.modules.optimization import Optimization, OptimizerFactory, ScheduleFactory, log_train

CANDIDATES = 256  # captions and images of the validation set


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy over the batch's similarities. image, text: unit vectors `[B, D]`. scale: a scalar."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Clip(L.LightningModule):
    """Trains a CLIP on (image, caption) pairs, and validates it by top-1 retrieval among `CANDIDATES` images.

    text, vision: sizes of the two towers, as in transformers' configs. seed: unused, but every model in conf/model sets it. The
    other arguments are those of `Optimization`.
    """

    def __init__(
        self,
        *,
        text: dict[str, Any],
        vision: dict[str, Any],
        tokenizer: CLIPTokenizer,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        clip_norm: Positive | None = 1.0,
        skip_non_finite: Whole = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.optimization = Optimization(optimizer, lr_schedule, clip_norm, skip_non_finite)
        self.register_load_state_dict_pre_hook(check_tensors)
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": tokenizer.model_max_length,
        }
        projection = {"projection_dim": text.get("projection_dim", 128)}
        self.clip = CLIPModel(CLIPConfig(text_config={**text, **special}, vision_config=vision, **projection))

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.optimization]

    def configure_optimizers(self) -> Any:
        return self.optimization.configure([{"params": list(self.parameters())}], self.trainer.max_steps)

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return unit image and text embeddings `[B, D]` float32."""
        ids = self.tokenizer(batch["captions"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = self.clip(pixel_values=batch["x"], input_ids=ids.to(self.device))
        return F.normalize(out.image_embeds.float(), dim=-1), F.normalize(out.text_embeds.float(), dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = contrastive_loss(*self.embed(batch), self.clip.logit_scale.exp().clamp(max=100))
        log_train(self, loss, {}, len(batch["x"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._embedded: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._embedded.append(self.embed(batch))

    def on_validation_epoch_end(self) -> None:
        images, texts = (torch.cat(parts)[:CANDIDATES] for parts in zip(*self._embedded, strict=True))
        hits = (texts @ images.T).argmax(dim=1) == torch.arange(len(texts), device=self.device)
        self.log("val/retrieval_top1", hits.float().mean(), prog_bar=True)

    @rank_zero_only
    def save_model(self, folder: str) -> None:
        """Write `folder/clip`, and its text tower and tokenizer as the pipeline's `text_encoder` and `tokenizer`."""
        save_clip(folder, self.clip, self.tokenizer)
