"""CLIP's two towers, what they say about pictures, and the paper's metrics of an edit.

    python eval_clip.py --edit out/airplane          # the paper's Table 1: before and after
    python eval_clip.py --edit out/dog-closed --edit out/dog --quick          # two edits, compared
    python eval_clip.py --edit somebodys.safetensors --concept airplane       # made elsewhere
    python eval_clip.py --prompts mine.csv --edit out/airplane

The untouched model and every edit draw the same prompts from the same noise. The table has a row for each,
with 95 % intervals: Acc_e, the erased class under its own name (should fall), Acc_s, other classes (should
stay), Acc_g, synonyms, and Acc_a, associated phrases (should fall with it). What was drawn before with the
same weights and settings, in a folder beside this one, is not drawn again. grid.svg shows some pictures.

The CSV has a column prompt, and may have seed (or evaluation_seed, sd_seed; else it is --seed), and class (or
concept): what CLIP should see among the book's names. A column type, artist, label_str or profession, or any
by --group, gives a line of the table for each value. Works with any folder in the layout of transformers'
CLIPModel: `mini/clip`, openai/clip-vit-large-patch14. Paper: Radford et al. 2021.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_text import SUPPORTED as TEXT_SUPPORTED, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Encoder
from plumbing import UserError
from plumbing.cli import DTYPES, EDIT, command_line, measuring_args, pick_device, program
from plumbing.detectors import find_detector
from plumbing.disk import write_json
from plumbing.edits import edit_labels, erased_by, read_edit
from plumbing.models import model_folder, model_name
from plumbing.own_prompts import names_among, read_prompts, score_prompts
from plumbing.prompts import TASKS, choices, names_to_choose, prompts_to_watch, row_prompts
from plumbing.results import RANK, Picture, asked_for, evaluate, out_folder, picture_name, text_vectors
from plumbing.stats import as_markdown, bootstrap, frechet, wilson, write_tables
from plumbing.weights import check_finite, load_network, read_config
from sample import Model, draw_each, write_sheets


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
class Joint:
    """The width of the space in which both towers meet."""
    projection_dim: int = 512


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
        end = ids.argmax(dim=1)                                   # its row sees none of those after it
        rows = self.text_model(ids[:, :end.max() + 1])[torch.arange(len(ids)), end]
        return F.normalize(self.text_projection(rows), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] as `preprocess` makes them -> unit vectors [B, P]."""
        features = F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)
        check_finite(features, "CLIP", features.dtype)
        return features

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
        text = self.text_features(self.tokenizer(prompts).to(self.logit_scale.device))
        image = torch.cat([self.image_features(self.preprocess(part.to(self.logit_scale)))
                           for part in pictures.split(256)])
        return (self.logit_scale.exp() * image @ text.T).softmax(dim=-1).cpu()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "CLIP":
        """Read a CLIPModel folder with its tokenizer. Raises UserError naming what is missing."""
        folder = Path(folder)
        config = CLIPConfig(read_config(folder, TextHalf, TEXT_SUPPORTED, section="text_config"),
                            read_config(folder, CLIPVisionConfig, TEXT_SUPPORTED, section="vision_config"),
                            read_config(folder, Joint, {}).projection_dim)
        clip = load_network(cls, config, folder, "model", dtype, device,
                            rename=lambda key: None if key.endswith(".position_ids") else key)
        clip.tokenizer = CLIPTokenizer.from_pretrained(folder)
        return clip


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]      # of CLIP's training pictures
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def judge(flag: str | None, folder: Path, device) -> CLIP:
    """The CLIP to judge by: --clip, or the one in the model's folder."""
    if not flag and not (folder / "clip").is_dir():
        raise UserError(f"{folder} has no clip/: name one by --clip, such as openai/clip-vit-large-patch14, "
                        "or the paper's ViT-B/32 as a folder with safetensors")
    return CLIP.from_pretrained(model_folder(flag, "--clip") if flag else folder / "clip", device=device)


# ------------------------------------------------------------------ the paper's metrics (section 5)
#
# Outcomes of one row of a table are four groups of numbers per picture: e, the erased class under its own
# name; s, the other classes; g, the synonyms; a, the associated phrases: the concept residue, which the paper
# counts for celebrities and styles (as their Acc_g), but not for objects. A number is 1 or 0 (top-1: CLIP's
# first choice is what was erased; for s: what was asked for), or a probability. Papers mix the two: MACE's
# script, which RealEra follows, averages the probability.

def harmonic(acc_e: float, acc_s: float, acc_g: float) -> float:
    """H_o of accuracies in [0, 1]: 3 / (1/(1 − Acc_e) + 1/Acc_s + 1/(1 − Acc_g)), 0 if a term is 0."""
    terms = (1 - acc_e, acc_s, 1 - acc_g)
    return 3 / sum(1 / term for term in terms) if min(terms) > 0 else 0.0


def h_o(means: dict[str, float]) -> float:
    return harmonic(means["e"], means["s"], means["g" if "g" in means else "a"])   # phrases, if no synonyms


def summary(rows: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Metrics of one row, or the average of several, in percent: {"Acc_e": [value, low, high], …, "H_o": …}.

    Accuracies that count pictures, as many in each row, have Wilson's interval, which says something at 0 and
    100, too; everything else is bootstrapped. The average H_o is the mean of the rows' H_o, as in Table 1.
    """
    found = {}
    for group in dict.fromkeys(group for row in rows for group in row):              # a class may have none
        some = [row[group].double() for row in rows if group in row]
        x, value = torch.cat(some), sum(x.mean().item() for x in some) / len(some)
        if len(set(map(len, some))) == 1 and bool(((x == 0) | (x == 1)).all()):
            low, high = wilson(value, len(x))
        else:
            low, high = bootstrap([{group: x} for x in some], lambda m: m[group])
        found[f"Acc_{group}"] = [value, low, high]
    means = [{group: x.double().mean().item() for group, x in row.items()} for row in rows]
    found["H_o"] = [sum(map(h_o, means)) / len(rows), *bootstrap(rows, h_o)]
    return {name: [round(100 * number, 2) for number in numbers] for name, numbers in found.items()}


@torch.no_grad()
def outcomes(clip: CLIP, concept: str, found: dict[Picture, Tensor], seeds: range,
             task: str = "object", erased=(), listed: list[dict] = ()) -> dict[str, dict]:
    """What CLIP says, by way of counting and group: {"top-1": {"e": [pictures], "s": …}, …}.

    top-1 and probability choose among classes, other things and scenes: a choice without "none of them" may
    call plain sky an airplane. "ten-way" chooses among the classes alone, and "ten-way probability", what the
    paper prints, is the softmax there. Celebrities are chosen among the five (or those that are `listed`, as
    row_prompts takes them) and "a person"; the paper's own judge, GCD, is a --detector. Styles are scored by
    the cosine with "an artwork by …", also where the prompt was another (the paper is silent)."""
    names, prompts = choices(task, concept, listed)
    text = text_vectors(clip, tuple(prompts))                     # [names, P]
    counted: dict[str, dict] = {}
    for group, rows in row_prompts(concept, task, seeds, erased, listed).items():
        features = torch.stack([found[prompt, seed] for _, prompt, seed in rows])
        wanted, at = torch.tensor([names.index(name) for name, _, _ in rows]), torch.arange(len(rows))
        cosines = features @ text.T                                                  # [pictures, names]
        logits = clip.logit_scale.exp().cpu() * cosines
        ten = logits[:, :len(names)]
        ways = {"CLIP score": cosines[at, wanted]} if task == "style" else {
            "top-1": logits.argmax(1) == wanted, "probability": logits.softmax(1)[at, wanted],
            "ten-way": ten.argmax(1) == wanted, "ten-way probability": ten.softmax(1)[at, wanted]}
        for how, x in ways.items():
            counted.setdefault(how, {})[group] = x.float()
    return counted


def shown(model, clip: CLIP, prompts: list[tuple[str, str]], n: int, steps: int | None):
    """(wanted, prompt) -> the share of n pictures each in which CLIP sees what is wanted, [prompts]; and the
    pictures [prompts · n, 3, H, W]."""
    names = names_to_choose([])
    asked = [prompt for _, prompt in prompts for _ in range(n)]
    pictures = model.draw(asked, [*range(n)] * len(prompts), steps)
    said = clip.classify(pictures, [f"a photo of the {name}" for name in names]).argmax(1).view(-1, n)
    wanted = torch.tensor([names.index(name) for name, _ in prompts])
    return (said == wanted[:, None]).float().mean(1), pictures


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--edit", action="append", default=[], help=f"{EDIT}; several are compared")
    parser.add_argument("--concept", action="append", default=[],
                        help="what is erased, if an edit does not say it itself; may be repeated")
    parser.add_argument("--task", choices=TASKS, default="object", help="what --concept is (default object)")
    parser.add_argument("--prompts", type=Path, help="CSV of your own prompts, one picture a row")
    parser.add_argument("--group", action="append", default=[], metavar="COLUMN", type=str.lower,
                        help="of --prompts: a line of the table for each of its values; may be repeated")
    parser.add_argument("--choose-from", metavar="A,B,C", help="what CLIP chooses among, beside the classes "
                        "in --prompts (default: all that the book names)")
    parser.add_argument("--detector", help="nudenet, or module:function: another judge, of the PNGs")
    args = measuring_args(parser)
    if not args.prompts and (not args.edit or args.group or args.choose_from):
        parser.error("give --edit out/NAME, --prompts FILE.csv (--group, --choose-from need it), or both")
    detect = find_detector(args.detector) if args.detector else None
    device, folder, labels = pick_device(args.device), model_folder(args.model), edit_labels(args.edit)
    erased, csv_rows = [], []
    if args.prompts:
        csv_rows = read_prompts(args.prompts, args.seed, args.group)
        among = names_among(csv_rows, args.choose_from)
        jobs = others = [(row["prompt"], row["seed"]) for row in csv_rows]
    else:
        erased = erased_by(args.edit, args.concept, args.task)
        names, seeds = [concept for concept, _ in erased], range(args.seed, args.seed + args.n)
        groups = [row_prompts(*what, seeds, names) for what in erased]
        jobs = [(prompt, seed) for group in groups for rows in group.values() for _, prompt, seed in rows]
        others = [(prompt, seed) for group in groups for _, prompt, seed in group["s"]]
    asked = asked_for(args, labels, erased, folder)
    out = out_folder(args, labels, asked)
    model, clip = Model(folder, device, DTYPES[args.dtype]), judge(args.clip, folder, device)
    weights = {"untouched": {}} | {k: read_edit(x, folder, model.text) for k, x in zip(labels, args.edit)}
    rows, detected, untouched = [], [], None
    for variant, W in weights.items():
        model.put(W)
        keep = out / "pictures" / variant if args.keep_pictures or detect else None
        found = evaluate(model, clip, jobs, out / "results", args.steps, None, args.batch, keep, variant,
                         reuse=sorted(out.parent.glob("*/results")))
        features = torch.stack([found[job] for job in others])
        untouched = features if untouched is None else untouched
        moved = {"Fréchet": round(frechet(features, untouched), 4)} if len(others) > 1 else {}
        if args.prompts:
            files = [{"picture": f"pictures/{variant}/{picture_name(job)}"} if keep else {} for job in jobs]
            scored, summaries = score_prompts(clip, [row | file for row, file in zip(csv_rows, files)], found,
                                              among, args.group)
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
    if not args.prompts:                                          # what is to be compared stands together
        ways = list(dict.fromkeys(row["counted"] for row in rows))
        rows.sort(key=lambda row: (names.index(row["erased"]), ways.index(row["counted"])))
    if RANK == 0:
        write_grids(out, model, weights, [prompt for prompt, _ in jobs], erased, args)
        write_json(out / "asked.json", asked, indent=1)
        write_tables(out, "metrics", rows)
        if detect:
            write_tables(out, "detected", detected)
        print(f"{as_markdown(rows)}\n{as_markdown(detected) if detect else ''}\nwrote {out}/")


def write_grids(out: Path, model: Model, weights: dict, prompts: list[str], erased: list, args) -> None:
    """For the eye: a few prompts, at most four seeds each, as grid.png and, with labels, grid.svg."""
    some = list(dict.fromkeys(prompts))
    if {task for _, task in erased} == {"object"}:
        some = list(dict.fromkeys(prompt for name, _ in erased for _, prompt in prompts_to_watch(name)))
    some, seeds = some[:8 * max(1, len(erased))], range(args.seed, args.seed + min(args.n, 4))
    drawn = draw_each(model, some, weights, seeds, steps=args.steps, batch=args.batch)
    steps = args.steps or model.defaults["steps"]
    settings = {"steps": steps, "guidance": model.defaults["guidance"], "dtype": args.dtype}
    what, name = ", ".join(concept for concept, _ in erased), model_name(args.model)
    about = {"seed": list(seeds), "edit": list(weights)[1:], "model": name, "settings": settings}
    write_sheets(out / "grid.png", drawn, some, about,
                 title=f"erased: {what}" if what else f"prompts of {args.prompts.name}",
                 footer=f"{name}: seeds {seeds[0]}–{seeds[-1]}, {steps} steps")


if __name__ == "__main__":
    command_line(main, shared=True)
