"""The model card's numbers: what `mini/` draws, seen by `mini/clip` and by a judge that only knows photos.

    python mini/measure.py --data cifar-10-batches-bin --n 20
    python mini/measure.py --data cifar-10-batches-bin --n 50 --kinds class synonym --edit out/airplane

The judge is a small ResNet, trained on the photos and scene crops alone (kept in --work). It never chooses a
picture or a photo. Both choose among the ten classes and the five scenes.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from train import CLASSES, HERE, Captions, Photos, Run, to_float

from eval_clip import CLIP  # noqa: E402  (train.py puts the folder above on the path)
from command import command_line
from files import grid, write_png
from sample import Model, Text


class Judge(nn.Module):
    """A ResNet of six convolutions: [B, 3, 32, 32] in [0, 1] -> logits of ten classes and five scenes."""

    def __init__(self, widths=(48, 96, 192)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for c_in, c in zip((widths[0], *widths), widths):
            stride = 1 if c_in == c else 2
            self.blocks.append(nn.ModuleDict({
                "conv1": nn.Conv2d(c_in, c, 3, stride, 1, bias=False), "norm1": nn.GroupNorm(8, c),
                "conv2": nn.Conv2d(c, c, 3, 1, 1, bias=False), "norm2": nn.GroupNorm(8, c),
                "skip": nn.Conv2d(c_in, c, 1, stride, bias=False)}))
        self.head = nn.Linear(widths[-1], 15)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem((x - 0.5) / 0.25))
        for block in self.blocks:
            h = F.relu(block["norm1"](block["conv1"](x)))
            x = F.relu(block["norm2"](block["conv2"](h)) + block["skip"](x))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_judge(args, photos: Photos) -> Judge:
    torch.manual_seed(1)
    judge = Judge().to(args.device)
    x, y = photos.x.to(args.device), photos.y.to(args.device)

    def loss(rng: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(x), (128,), generator=rng).to(args.device)
        batch = to_float(x[rows])
        if torch.rand((), generator=rng) < 0.5:
            batch = batch.flip(-1)
        dy, dx = torch.randint(0, 9, (2,), generator=rng).tolist()
        batch = F.pad(batch, (4, 4, 4, 4), mode="reflect")[..., dy:dy + 32, dx:dx + 32]
        return F.cross_entropy(judge(batch), y[rows], label_smoothing=0.1)

    run = Run("judge", judge, args.steps, 3e-3, 0.05, args, ema=0.995)
    run.train(loss)
    test = Photos(args.data, ("test_batch.bin",))
    with torch.no_grad():
        right = torch.cat([run.average(to_float(b.to(args.device))).argmax(1).cpu()
                           for b in test.x.split(500)]) == test.y
    print(f"judge: {right[:10000].float().mean():.1%} of the 10,000 test photos, "
          f"{right[10000:].float().mean():.1%} of the test scenes")
    return run.average


def nearest(a: Tensor, b: Tensor, same: bool = False) -> tuple[Tensor, Tensor]:
    """Per picture of a: mean absolute pixel difference to its nearest in b, mirrored or not, and which."""
    flat = b.flatten(1)
    d = torch.minimum(torch.cdist(a.flatten(1), flat, p=1), torch.cdist(a.flip(-1).flatten(1), flat, p=1))
    if same:
        d.fill_diagonal_(torch.inf)
    value, index = d.min(1)
    return value / flat.shape[1], index


def cosines(text: Text, book: dict) -> dict[str, list[float]]:
    """Cosine of the edited rows of "a photo of the {class}" to other prompts' rows: [mean, least, most]."""
    def rows(prompt: str) -> Tensor:
        return text([prompt])[0, max(1, text.tokenizer.count(prompt)):]

    def cosine(p: str, q: str) -> float:
        a, b = rows(p), rows(q)
        n = min(len(a), len(b))
        return F.cosine_similarity(a[:n].flatten(), b[:n].flatten(), dim=0).item()

    found = {"synonyms": [], "associated": [], "other classes": []}
    for c, entry in book.items():
        own = f"a photo of the {c}"
        found["synonyms"] += [cosine(own, f"a photo of the {s}") for s in entry["synonyms"]]
        found["associated"] += [cosine(own, phrase) for phrase in entry["associated"]]
        found["other classes"] += [cosine(own, f"a photo of the {d}") for d in book if d != c]
    return {kind: [round(x, 2) for x in (sum(v) / len(v), min(v), max(v))] for kind, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's binary version")
    parser.add_argument("--model", type=Path, default=HERE, help="model folder (default: mini/)")
    parser.add_argument("--work", type=Path, default=HERE / "work",
                        help="the judge's checkpoint and the grids")
    parser.add_argument("--n", type=int, default=20, help="pictures per prompt (default 20)")
    kinds = ["class", "synonym", "associated", "scene"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="of prompts (default: all)")
    parser.add_argument("--edit", type=Path, help="draw with this edit folder, such as out/airplane")
    parser.add_argument("--steps", type=int, default=1200, help="the judge's training steps (default 1200)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.minutes, prefix = 1e9, "edit-" if args.edit else ""
    args.work.mkdir(parents=True, exist_ok=True)
    photos, captions = Photos(args.data), Captions()
    model = Model(args.model, args.device, edit=args.edit)
    clip = CLIP.from_pretrained(args.model / "clip", device=args.device)
    book = json.loads((HERE / "captions.json").read_text())["classes"]
    report = {"cosines": cosines(model.text, book)}
    print("cosine to the class word, mean and range", report["cosines"], flush=True)
    judge = train_judge(args, photos).eval()
    kinds = {"class": [(c, f"a photo of the {c}") for c in CLASSES],
             "synonym": [(c, f"a photo of the {s}") for c in CLASSES for s in book[c]["synonyms"]],
             "associated": [(c, s) for c in CLASSES for s in book[c]["associated"]],
             "scene": [(s, f"a photo of the {s}") for s in captions.scenes]}
    choices = CLASSES + captions.scenes
    for kind in args.kinds:
        prompts = kinds[kind]
        pictures = model.draw([p for _, p in prompts for _ in range(args.n)],
                              list(range(args.n)) * len(prompts))
        said = {"clip": clip.classify(pictures, [f"a photo of the {c}" for c in choices]).argmax(1),
                "judge": judge(pictures.to(args.device)).argmax(1).cpu()}
        truth = torch.tensor([choices.index(c) for c, _ in prompts]).repeat_interleave(args.n)
        right = {who: (guess == truth).float().view(len(prompts), args.n).mean(1)
                 for who, guess in said.items()}
        report[kind] = {who: round(100 * r.mean().item(), 1) for who, r in right.items()}
        for i, (c, prompt) in enumerate(prompts):
            for who, guess in said.items():
                votes = guess.view(len(prompts), args.n)[i].bincount(minlength=len(choices))
                most = votes.argmax().item()
                report[f"{prompt} ({who})"] = {c: round(100 * right[who][i].item()),
                                               choices[most]: round(100 * votes[most].item() / args.n)}
        write_png(args.work / f"{prefix}{kind}.png",
                  grid(pictures.view(len(prompts), args.n, *pictures.shape[1:])[:, :10].flatten(0, 1),
                       min(args.n, 10), zoom=2))
        print(kind, report[kind], flush=True)
        if kind == "class" and not args.edit:
            place = argparse.Namespace(out=args.model, device=args.device)
            real = to_float(photos.x[train.typical(place, train.RECIPES["laptop"], photos)])[:2000]
            drawn, which = nearest(pictures, real)
            among = nearest(real, real, same=True)[0]
            report["nearest"] = {"drawn": round(drawn.median().item(), 4),
                                 "photos": round(among.median().item(), 4)}
            pairs = torch.stack([pictures[::args.n], real[which[::args.n]]], 1).flatten(0, 1)
            write_png(args.work / "nearest.png", grid(pairs, 10, zoom=2))
            print("median distance to the nearest training photo", report["nearest"], flush=True)
    (args.work / f"{prefix}measured.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main)
