"""CLIP's two towers, and what they say about pictures: zero-shot classification.

    clip = CLIP.from_pretrained("mini/clip")
    p = clip.classify(pictures, ["a photo of the airplane", "a photo of the sky"])    # [N, 2], rows sum to 1

Works with any folder in the layout of transformers' CLIPModel: `mini/clip`, openai/clip-vit-base-patch32.
Paper: Radford et al. 2021.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import SUPPORTED as TEXT_SUPPORTED
from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Encoder
from concepts import BOOK, prompts_to_watch
from files import grid, load_network, put_weights, read_config, read_json
from lora import lora_off


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Widths of the image tower; the defaults are openai/clip-vit-base-patch32."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextHalf(CLIPTextConfig):
    """Its text tower is narrower than SD's, and these are what transformers takes for absent keys."""
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8


@dataclass(frozen=True)
class CLIPConfig:
    text: CLIPTextConfig = TextHalf()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        size, patch, width = config.image_size, config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((size // patch) ** 2 + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)                 # [B, L, D]
        first = self.class_embedding.expand(x.shape[0], 1, -1)                       # [B, 1, D]
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight   # [B, 1 + L, D]


class VisionModel(nn.Module):
    """pixels [B, 3, S, S], normalised -> the class token's final state [B, D]."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)   # spelled as in the file
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(x)))[:, 0])


class CLIP(nn.Module):
    """Two towers that meet in one space of `projection_dim` dimensions."""

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel(config.text)
        self.vision_model = VisionModel(config.vision)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))     # log of 1 / 0.07, CLIP's start

    def text_features(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> unit vectors [B, P], read at the first end-of-text token (the largest id)."""
        rows = self.text_model(ids)
        return F.normalize(self.text_projection(rows[torch.arange(len(ids)), ids.argmax(dim=1)]), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] as `preprocess` makes them -> unit vectors [B, P]."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def preprocess(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> short side resized (bicubic), center-cropped, normalised [B, 3, S, S]."""
        size, (h, w) = self.config.vision.image_size, pictures.shape[-2:]
        if (h, w) != (size, size):
            short = min(h, w)
            shape = (int(h * size / short), int(w * size / short))
            pictures = F.interpolate(pictures, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            pictures = pictures[..., top:top + size, left:left + size]
        return (pictures - MEAN.to(pictures)) / STD.to(pictures)

    @torch.no_grad()
    def classify(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """pictures [N, 3, H, W] in [0, 1] -> probability of each prompt, by scaled cosine, [N, prompts]."""
        device = self.logit_scale.device
        text = self.text_features(self.tokenizer(prompts).to(device))
        image = torch.cat([self.image_features(self.preprocess(part.to(self.logit_scale)))
                           for part in pictures.split(256)])
        return (self.logit_scale.exp() * image @ text.T).softmax(dim=-1).cpu()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "CLIP":
        """Read a CLIPModel folder with its tokenizer. Raises UserError naming what is missing."""
        folder = Path(folder)
        config = CLIPConfig(read_config(folder, TextHalf, TEXT_SUPPORTED, section="text_config"),
                            read_config(folder, CLIPVisionConfig, TEXT_SUPPORTED, section="vision_config"),
                            read_json(folder / "config.json").get("projection_dim", 512))
        clip = load_network(cls, config, folder, "model", dtype, device,
                            rename=lambda key: None if key.endswith(".position_ids") else key)
        clip.tokenizer = CLIPTokenizer.from_pretrained(folder)
        return clip


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]      # of CLIP's training pictures
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

def before_after(model, W0: dict[str, Tensor], W: dict[str, Tensor], pairs, n: int, seed: int):
    """Draw with the original and with the edited matrices, n pictures a prompt, from the same seeds.

    Prints what CLIP sees if the model's folder has one. Returns that table (a list of rows) and the picture,
    uint8 [height, width, 3]: a row per prompt, left before, right after.
    """
    watched = list(dict.fromkeys(row for pair in pairs for row in prompts_to_watch(pair.concept)))
    prompts = [prompt for _, prompt in watched for _ in range(n)]
    drawn = {}
    for when, weights in (("before", W0), ("after", W)):
        put_weights(model.unet, weights)
        with lora_off(model.unet):                                # what it learned is part of W
            drawn[when] = model.draw(prompts, [seed + i for _ in watched for i in range(n)])
    table = [{"prompt": prompt, "wanted": wanted} for wanted, prompt in watched]
    if (model.folder / "clip").is_dir():
        clip, book = CLIP.from_pretrained(model.folder / "clip"), read_json(BOOK)
        names = dict.fromkeys([*book["classes"], *book["scenes"], *(p.concept for p in pairs)])
        names = list(names | dict.fromkeys(pair.anchor for pair in pairs if pair.anchor))
        print(f"\nCLIP's first choice of {len(names)} names, {n} pictures a prompt")
        print(f"{'prompt':<28}{'before':<32}after")
        for when, pictures in drawn.items():
            said = clip.classify(pictures, [f"a photo of the {name}" for name in names]).argmax(1).view(-1, n)
            for row, guesses in zip(table, said):
                most = guesses.mode().values
                row[when] = {"right": (guesses == names.index(row["wanted"])).sum().item(),
                             "mostly": names[most], "times": (guesses == most).sum().item()}
        for row in table:
            print(f"{row['prompt'][:26]:<28}{seen(row, 'before', n):<32}{seen(row, 'after', n)}")
    sheet = torch.cat([pictures.unflatten(0, (-1, n))[:, :8] for pictures in drawn.values()], dim=1)
    return table, grid(sheet.flatten(0, 1), sheet.shape[1], zoom=max(1, 96 // sheet.shape[-1]))


def seen(row: dict, when: str, n: int) -> str:
    """"airplane 0/4, mostly sky 4": how many are what was wanted, and what most are if they are not."""
    cell = row[when]
    other = f", mostly {cell['mostly']} {cell['times']}" if cell["mostly"] != row["wanted"] else ""
    return f"{row['wanted']} {cell['right']}/{n}{other}"
