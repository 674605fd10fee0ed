"""CLIP (2103.00020): the image and text towers behind a pipeline's text encoder and the mini metrics."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lcm.models.saving import save_clip
from lcm.modules.base import TrainedModule

CANDIDATES = 256  # of the validation's captions and images


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch's similarities; image, text: `[B, D]` unit vectors, scale: scalar."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Clip(TrainedModule):
    """Trains a CLIP of the given tower sizes on (image, caption) pairs; validates by top-1 retrieval among `CANDIDATES`."""

    def __init__(self, *, text: dict[str, Any], vision: dict[str, Any], tokenizer: CLIPTokenizer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": tokenizer.model_max_length,
        }
        projection = {"projection_dim": text.get("projection_dim", 128)}
        self.clip = CLIPModel(CLIPConfig(text_config={**text, **special}, vision_config=vision, **projection))

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit image and text embeddings `[B, D]` float32."""
        ids = self.tokenizer(batch["captions"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = self.clip(pixel_values=batch["x"], input_ids=ids.to(self.device))
        return F.normalize(out.image_embeds.float(), dim=-1), F.normalize(out.text_embeds.float(), dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = contrastive_loss(*self.embed(batch), self.clip.logit_scale.exp().clamp(max=100))
        self.log_train(loss, {}, len(batch["x"]))
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
