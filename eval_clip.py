"""CLIP's two towers, what they say about pictures, and the paper's metrics of an edit.

    python eval_clip.py --edit out/airplane          # a row of the paper's Table 1, and the untouched model's
    python eval_clip.py --edit out/airplane --quick
    python eval_clip.py --edit out/airplane --edit out/ship          # merged: rows for each concept
    python eval_clip.py --prompts mine.csv --edit out/airplane

The CSV has a column prompt, and may have seed (or evaluation_seed), and class (or concept): what CLIP should
see. Its other columns are kept. A row without a seed takes --seed. Works with any folder in the layout of
transformers' CLIPModel: `mini/clip`, openai/clip-vit-large-patch14. Paper: Radford et al. 2021.
"""
import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import SUPPORTED as TEXT_SUPPORTED
from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Encoder
from command import DTYPES, command_line, measuring_args, pick_device
from concepts import BOOK, prompts_to_watch, read_prompts, row_prompts
from detectors import find_detector
from files import (UserError, about_edit, cross_attention, load_network, model_folder, put_weights,
                   read_config, read_json, whole)
from lora import lora_off
from metrics import as_csv, as_markdown, bootstrap, frechet, summary, wilson
from pictures import grid, write_png


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


def names_to_choose(pairs) -> list[str]:
    """What CLIP chooses among when an edit is looked at: classes, scenes, concepts and anchors."""
    book = read_json(BOOK)
    named = [name for pair in pairs for name in (pair.concept, pair.anchor) if name]
    return list(dict.fromkeys([*book["classes"], *book["scenes"], *named]))


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
        clip, names = CLIP.from_pretrained(model.folder / "clip"), names_to_choose(pairs)
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


def judge(flag: str | None, folder: Path, device) -> CLIP:
    """The CLIP to judge by: --clip, or the one in the model's folder."""
    if not flag and not (folder / "clip").is_dir():
        raise UserError(f"{folder} has no clip/: name one by --clip, such as openai/clip-vit-large-patch14, "
                        "or the paper's ViT-B/32 as a folder with safetensors")
    return CLIP.from_pretrained(model_folder(flag, "--clip") if flag else folder / "clip", device=device)


def write_tables(out: Path, name: str, rows: list[dict]) -> None:
    """`rows` as name.json, name.csv and name.md."""
    texts = {"json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "csv": as_csv(rows),
             "md": as_markdown(rows)}
    out.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        with whole(out / f"{name}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")


@torch.no_grad()
def score_prompts(clip: CLIP, rows: list[dict], found) -> tuple[list[dict], list[dict]]:
    """Per row of the CSV its CLIP score, 100 · cosine of picture and prompt, and CLIP's choice of class; and
    a summary per class and over all."""
    features = torch.stack([found[row["prompt"], row["seed"]] for row in rows])      # [rows, P]
    device, names = clip.logit_scale.device, list(dict.fromkeys(row["class"] for row in rows if row["class"]))

    def text(prompts: list[str]) -> Tensor:
        ids = clip.tokenizer(prompts).to(device)
        return torch.cat([clip.text_features(part).cpu() for part in ids.split(64)])

    scores = 100 * (features * text([row["prompt"] for row in rows])).sum(1)
    for row, score in zip(rows, scores.tolist()):
        row["CLIP score"] = round(score, 3)
    if names:
        for row, i in zip(rows, (features @ text([f"a photo of the {name}" for name in names]).T).argmax(1)):
            row["CLIP says"] = names[i]
    groups = []
    for name in [*names, None]:
        some = [i for i, row in enumerate(rows) if name is None or row["class"] == name]
        part = scores[some]
        groups.append({"class": name or "all", "pictures": len(some), "CLIP score": [
            round(x, 2) for x in (part.mean().item(), *bootstrap([{"": part}], lambda m: m[""]))]})
        if name:
            right = sum(rows[i]["CLIP says"] == name for i in some) / len(some)
            groups[-1]["top-1"] = [round(100 * x, 2) for x in (right, *wilson(right, len(some)))]
    return rows, groups


def main() -> None:
    from merge import edited_weights
    from sample import Model
    from scores import RANK, evaluate, outcomes
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edit", action="append", default=[],
                        help="an edit folder such as out/airplane; several of realera.py are merged")
    parser.add_argument("--prompts", type=Path, help="CSV of your own prompts, one picture a row")
    parser.add_argument("--detector", help="nudenet, or module:function: another judge, of the PNGs")
    args = measuring_args(parser)
    if not args.edit and not args.prompts:
        raise UserError("give --edit out/NAME, --prompts FILE.csv, or both")
    detect = find_detector(args.detector) if args.detector else None
    device, folder = pick_device(args.device), model_folder(args.model)
    erased = [(concept, about.get("task", "object")) for about in map(about_edit, args.edit)
              for concept in about.get("concepts", [])]
    names, seeds = [concept for concept, _ in erased], range(args.seed, args.seed + args.n)
    if args.prompts:
        csv_rows, name = read_prompts(args.prompts, args.seed), args.prompts.stem
        jobs = others = [(row["prompt"], row["seed"]) for row in csv_rows]
    else:
        groups, name = [row_prompts(*what, seeds, names) for what in erased], "+".join(
            sorted(Path(edit).name for edit in args.edit))
        jobs = [(prompt, seed) for group in groups for rows in group.values() for _, prompt, seed in rows]
        others = [(prompt, seed) for group in groups for _, prompt, seed in group["s"]]
    out = args.out or Path("out/evaluation") / name
    model, clip = Model(folder, device, DTYPES[args.dtype]), judge(args.clip, folder, device)
    weights = {"untouched": cross_attention(folder)}
    if args.edit:
        weights["edited"] = edited_weights(args.edit, folder, model.text)
    rows, detected, pictures, untouched = [], [], [], None
    for variant, W in weights.items():
        put_weights(model.unet, W)
        keep = out / "pictures" / variant if args.keep_pictures or detect else None
        found = evaluate(model, clip, jobs, out / "results", args.steps, None, args.batch, keep, variant)
        features = torch.stack([found[job] for job in others])
        untouched = features if untouched is None else untouched
        moved = {"Fréchet": round(frechet(features, untouched), 4)} if len(others) > 1 else {}
        if args.prompts:
            scored, summaries = score_prompts(clip, [dict(row) for row in csv_rows], found)
            rows += [{"variant": variant} | row for row in summaries]
            rows[-1] |= moved                                     # the last row is about all prompts
            if RANK == 0:
                write_tables(out, f"pictures-{variant}", scored)
        else:
            rows += [{"erased": concept, "variant": variant, "counted": how} | summary([counts]) | moved
                     for concept, task in erased
                     for how, counts in outcomes(clip, concept, found, seeds, task, names).items()]
        if detect and RANK == 0:
            detected.append({"variant": variant} | detect(keep))
        if RANK == 0:                                             # for the eye: a few prompts, four seeds
            some = list(dict.fromkeys(prompt for prompt, _ in jobs))
            if not args.prompts and {task for _, task in erased} == {"object"}:
                some = list(dict.fromkeys(p for name in names for _, p in prompts_to_watch(name)))
            some = some[:8 * max(1, len(names))]
            pictures.append(model.draw([p for p in some for _ in range(4)],
                                       [args.seed + i for _ in some for i in range(4)], args.steps,
                                       batch=args.batch))
    if RANK == 0:
        sheet = torch.cat([x.unflatten(0, (-1, 4)) for x in pictures], dim=1)
        write_png(out / "grid.png", grid(sheet.flatten(0, 1), sheet.shape[1], max(1, 96 // sheet.shape[-1])))
        write_tables(out, "metrics", rows)
        if detect:
            write_tables(out, "detected", detected)
        print(f"{as_markdown(rows)}\n{as_markdown(detected) if detect else ''}\nwrote {out}/")


if __name__ == "__main__":
    command_line(main)
