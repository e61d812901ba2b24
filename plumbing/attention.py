"""Cross-attention for methods that train on it: its probabilities, and which columns are a concept's."""
import contextlib
from os.path import commonprefix
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.training import predict

MASK_TIME = 300                 # of 1000: so much noise is in the pictures that attention is asked for masks


@contextlib.contextmanager
def attention_of(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Inside a `with` block, a list that every prediction adds its probabilities to: one [B, heads, L, T] of
    each attn2 on the way, for L pixels and T tokens. They can be differentiated."""
    layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    seen: list[Tensor] = []
    for layer in layers:
        layer.seen = seen
    try:
        yield seen
    finally:
        for layer in layers:
            layer.seen = None


def concept_columns(tokenizer, template: str, concept: str, padding: bool) -> list[int]:
    """The tokens of template.format(concept) that are the concept's own, the end token, and with `padding`
    all end tokens after it: SD v1's padding is of these, SD v2's is not."""
    start = 1 + tokenizer.count(template.partition("{}")[0])      # 0 is begin-of-text
    end = 1 + tokenizer.count(template.format(concept))
    ends = (tokenizer([template.format(concept)])[0] == tokenizer.eos).nonzero()[:, 0].tolist()
    return [*range(start, start + tokenizer.count(concept)), *(ends if padding else [end])]


def shared_rows(tokenizer, p: str, p_star: str) -> tuple[list[int], list[int]]:
    """Rows of two prompts that are each other's: what both begin with, what both end with, and all after it.
    Between lies what they differ in, a concept and its anchor; the longer side loses its end."""
    k, k_star = tokenizer.count(p), tokenizer.count(p_star)
    a, b = (ids[1:1 + n].tolist() for ids, n in zip(tokenizer([p, p_star]), (k, k_star)))
    first = len(commonprefix([a, b]))                             # of any lists, not of paths alone
    last = len(commonprefix([a[first:][::-1], b[first:][::-1]]))
    rows, rows_star = ([*range(1 + first), *range(1 + n - last, tokenizer.length)] for n in (k, k_star))
    return rows[:len(rows_star)], rows_star[:len(rows)]


def sides_of(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the level with so many pixels: each level halves the latent's, rounding up."""
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def attention_masks(model, z0: Tensor, rows: Tensor, columns: list[int], threshold: float) -> Tensor:
    """Where the concept is in pictures, 0 or 1 for each latent pixel, [B, h, w]: where the model's attention
    to these columns, its mean over layers and heads, is at least `threshold` of its maximum in the picture.
    0: everywhere; above 1: nowhere. z0 [B, 4, h, w], rows [T, D] of the prompt that they were drawn from."""
    times, size = torch.full((len(z0),), MASK_TIME, device=z0.device), z0.shape[2:]
    noise = model.noise(list(range(len(z0)))).to(z0.device)
    with torch.no_grad(), attention_of(model.unet) as seen:
        predict(model.unet, model.scheduler.add_noise(z0, noise, times), times, rows.expand(len(z0), -1, -1))
    looks = [A[..., columns].float().sum(-1).mean(1).unflatten(1, sides_of(A.shape[2], *size)) for A in seen]
    mean = sum(F.interpolate(x[:, None], size, mode="bilinear")[:, 0] for x in looks)
    return (mean >= threshold * mean.amax((1, 2), keepdim=True)).float()
