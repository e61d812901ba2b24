"""The model card's numbers: what `mini/` draws, seen by `mini/clip` and by a judge that only knows photos.

    python mini/measure.py --data cifar-10-batches-bin                    # provisional: 20 pictures a prompt
    python mini/measure.py --data cifar-10-batches-bin --n 200 --frechet 10000 --device cuda
    python mini/measure.py --data cifar-10-batches-bin --parts class synonym --edit out/airplane

Writes measured.json, measured.md (the card's tables) and a grid per part into --work. The judge is a small
ResNet, trained on the photos and scene crops alone (kept in --work). It never chooses a picture or a photo.
Both choose among the ten classes and the five scenes.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import edited, make_pairs
from eval_clip import CLIP
from mini.next.measure import Judge, eight_pictures, spread
from mini.train import CLASSES, HERE, RECIPES, Captions, Photos, Run, shifted, to_float, typical
from plumbing.cli import command_line, pick_device
from plumbing.edits import cross_attention, read_edit
from plumbing.pictures import grid, write_png
from plumbing.prompts import preserved_prompts
from plumbing.stats import frechet
from plumbing.weights import put_weights
from realera import Settings, erase_in_closed_form
from sample import Model, Text

PARTS = ["cosines", "photos", "class", "synonym", "associated", "scene",
         "diversity", "frechet", "residue", "cost"]


def train_judge(args, photos: Photos) -> Judge:
    torch.manual_seed(1)
    judge = Judge((len(CLASSES) + 5,), (48, 96, 192)).to(args.device, memory_format=torch.channels_last)
    x, y = photos.x.to(args.device), photos.y.to(args.device)

    def loss(rng: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(x), (128,), generator=rng).to(args.device)
        batch = shifted(to_float(x[rows]), 4, rng).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(judge(batch)[0], y[rows], label_smoothing=0.1)

    run = Run("judge", judge, args.steps, 3e-3, 0.05, args, ema=0.995)
    run.train(loss)
    return run.average.eval()


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


class Measure:
    """One method per part; each returns {row of the table: value} and may write a grid."""

    def __init__(self, args):
        self.args, self.n, self.prefix = args, args.n, "edit-" if args.edit else ""
        self.book = json.loads((HERE / "captions.json").read_text("utf-8"))["classes"]
        self.choices = CLASSES + Captions().scenes
        self.model = Model(args.model, args.device)
        self.model.put(read_edit(args.edit, args.model, self.model.text) if args.edit else {})
        self.clip = CLIP.from_pretrained(args.model / "clip", device=args.device)
        self.photos, self.test = Photos(args.data), Photos(args.data, ("test_batch.bin",))
        self.judge = train_judge(args, self.photos)
        self.of_class = None                                      # pictures of all classes, drawn once

    def draw(self, prompts: list[str], n: int, first: int = 0) -> Tensor:
        """[prompts, n, 3, 32, 32], seeds first … first + n − 1 for every prompt."""
        pictures = self.model.draw([p for p in prompts for _ in range(n)],
                                   list(range(first, first + n)) * len(prompts))
        return pictures.unflatten(0, (len(prompts), n))

    def classes(self, n: int) -> Tensor:
        if self.of_class is None:
            clouds = {"diversity", "frechet"} & set(self.args.parts)
            self.of_class = self.draw([f"a photo of the {c}" for c in CLASSES],
                                      max(self.n, self.args.frechet // 10 if clouds else 0))
        return self.of_class[:, :n]

    def said(self, pictures: Tensor) -> dict[str, Tensor]:
        """What each judge sees in pictures [prompts, n, 3, 32, 32]: index into `choices`, [prompts, n]."""
        flat = pictures.flatten(0, 1)
        seen = {"clip": self.clip.classify(flat, [f"a photo of the {c}" for c in self.choices]).argmax(1),
                "judge": self.judge.head(self.judge.look(flat).to(self.judge.head.weight)).argmax(1).cpu()}
        return {who: guess.view(pictures.shape[:2]) for who, guess in seen.items()}

    def top1(self, kind: str, wanted: list[str], prompts: list[str]) -> dict:
        pictures = self.classes(self.n) if kind == "class" else self.draw(prompts, self.n)
        write_png(self.args.work / f"{self.prefix}{kind}.png",
                  grid(pictures[:, :10].flatten(0, 1), min(self.n, 10), zoom=2))
        truth, report = torch.tensor([self.choices.index(c) for c in wanted])[:, None], {}
        for who, guess in self.said(pictures).items():
            right = (guess == truth).float().mean(1)
            least = right.argmin().item()
            report[who] = round(100 * right.mean().item(), 1)
            report[f"{who}, least"] = [prompts[least], round(100 * right[least].item(), 1)]
            report[f"{who}, per prompt"] = {p: round(100 * r.item()) for p, r in zip(prompts, right)}
        return report

    def measure_class(self) -> dict:
        return self.top1("class", CLASSES, [f"a photo of the {c}" for c in CLASSES])

    def measure_synonym(self) -> dict:
        named = [(c, f"a photo of the {s}") for c in CLASSES for s in self.book[c]["synonyms"]]
        return self.top1("synonym", *map(list, zip(*named)))

    def measure_associated(self) -> dict:
        return self.top1("associated", *map(list, zip(*[(c, s) for c in CLASSES
                                                        for s in self.book[c]["associated"]])))

    def measure_scene(self) -> dict:
        return self.top1("scene", self.choices[10:], [f"a photo of the {s}" for s in self.choices[10:]])

    def measure_cosines(self) -> dict:
        return cosines(self.model.text, self.book)

    @torch.no_grad()
    def measure_photos(self) -> dict:
        """How well the instruments know the test photos, and what the VAE makes of them."""
        x, y = to_float(self.test.x), self.test.y
        ten = self.clip.classify(x[y < 10], [f"a photo of the {c}" for c in CLASSES]).argmax(1)
        sure = self.judge.head(self.judge.look(x).to(self.judge.head.weight)).argmax(1).cpu() == y
        vae, part = self.model.vae, x[:1000].to(self.args.device)
        back = torch.cat([vae.decode(vae.encode(2 * b - 1)[0]) for b in part.split(100)]) / 2 + 0.5
        psnr = -10 * (back.clamp(0, 1) - part).square().mean((1, 2, 3)).log10().mean().item()
        return {"zero-shot by clip": round(100 * (ten == y[y < 10]).float().mean().item(), 1),
                "judge, classes": round(100 * sure[y < 10].float().mean().item(), 1),
                "judge, scenes": round(100 * sure[y >= 10].float().mean().item(), 1), "PSNR": round(psnr, 1)}

    def measure_diversity(self) -> dict:
        """Mean distance of two pictures of a class over that of two photos; and the nearest photos."""
        n, ratios = min(200, self.args.frechet // 10), []
        pictures = self.classes(n)
        for c in range(10):
            real = to_float(self.photos.x[self.photos.y == c][:n])
            ratios.append([spread(pictures[c].flatten(1)) / spread(real.flatten(1)),
                           spread(self.judge.look(pictures[c])) / spread(self.judge.look(real))])
        place = argparse.Namespace(out=self.args.model, device=self.args.device)
        chosen = typical(place, RECIPES["laptop"], self.photos)
        real = to_float(self.photos.x[chosen[self.photos.y[chosen] < 10]])
        some = pictures[:, :8]
        drawn, which = nearest(some.flatten(0, 1), real)
        among = nearest(real[::5], real[::5], same=True)[0]
        pairs = torch.stack([some[:8, 0], real[which.view(10, -1)[:8, 0]]])
        write_png(self.args.work / "nearest.png", grid(pairs.flatten(0, 1), 8, zoom=3))
        pixels, features = torch.tensor(ratios).mean(0).tolist()
        return {"pixels": round(100 * pixels, 1), "features": round(100 * features, 1), "pictures": n,
                "nearest photo, drawn": round(drawn.median().item(), 4),
                "nearest photo, photos": round(among.median().item(), 4)}

    def measure_frechet(self) -> dict:
        """In the judge's features, against the test photos of the ten classes."""
        n = self.args.frechet // 10
        test = to_float(self.test.x[self.test.y < 10])
        blurred = F.interpolate(F.avg_pool2d(test, 4), scale_factor=4)
        train_photos = torch.cat([to_float(self.photos.x[self.photos.y == c][:n]) for c in range(10)])
        real = self.judge.look(test)
        clouds = {"drawn": self.classes(n).flatten(0, 1), "training photos": train_photos, "blurred": blurred}
        found = {name: round(frechet(self.judge.look(x), real), 3) for name, x in clouds.items()}
        return found | {"pictures": 10 * n}

    def measure_residue(self) -> dict:
        """What the closed form of the class word alone leaves (Eq. 7, M = N = 0): the release criterion."""
        W0, settings, rows = cross_attention(self.args.model), Settings(M=0, N=0, lambda1=0.1), {}
        for concept in CLASSES:
            entry = self.book[concept]
            pairs = make_pairs([concept], [entry["anchor"]], "object", self.model.text, settings.rows, 0)
            stay = self.model.text(preserved_prompts("object", pairs))
            put_weights(self.model.unet, edited(W0, erase_in_closed_form(pairs, stay, settings)[0]))
            prompts = [f"a photo of the {name}" for name in [concept, *entry["synonyms"]]]
            said = self.said(self.draw(prompts + entry["associated"], self.n))["clip"]
            right = (said == CLASSES.index(concept)).float()
            e, g, a = (100 * part.mean().item() for part in right.split([1, 3, 4]))
            rows[concept] = {"Acc_e": round(e, 1), "Acc_g": round(g, 1), "Acc_a": round(a, 1)}
        put_weights(self.model.unet, W0)
        mean = {key: round(sum(row[key] for row in rows.values()) / 10, 1) for key in rows["ship"]}
        return mean | {"per class": rows}

    def measure_cost(self) -> dict:
        """One command as a user runs it, and what is on the disk."""
        if self.args.edit:
            return {}
        seconds, peak = eight_pictures(self.args)
        weights = sum(path.stat().st_size for path in self.args.model.glob("*/*model.safetensors"))
        return {"8 pictures": f"{seconds:.1f} s", "peak GiB": round(peak, 2),
                "MiB of weights": round(weights / 2 ** 20, 1),
                "U-Net parameters": sum(p.numel() for p in self.model.unet.parameters())}


def card(report: dict) -> str:
    """The goals and what was measured, as Markdown: report as main makes it, absent parts left out."""
    def both(found: dict) -> str:
        return " | ".join("{} % (least: {} {:.0f})".format(found[who], *found[f"{who}, least"])
                          for who in ("clip", "judge"))

    top1 = {"class": "“a photo of the {class}”, ten | ≥ 93, ≥ 88 %, none < 80",
            "synonym": "synonyms, thirty | ≥ 85 %",
            "associated": "associated phrases, forty | ≥ 75 %", "scene": "scenes, five | ≥ 90 %"}
    text = ["| prompts | goal | `mini/clip` | judge |", "|---|---|---|---|",
            *(f"| {row} | {both(report[kind])} |" for kind, row in top1.items() if kind in report),
            "", "| what | goal | measured |", "|---|---|---|"]
    rows = {
        "photos": ["zero-shot top-1 of `mini/clip`, test photos | ≥ 86 % | {zero-shot by clip} %",
                   "the judge on test photos, on test scenes | – | {judge, classes} %, {judge, scenes} %",
                   "VAE, 1,000 test photos | ≥ 30 dB | {PSNR} dB"],
        "frechet": ["Fréchet distance of {pictures} pictures to the test photos, judge's features "
                    "| ≤ ⅓ of blurred | {drawn}; training photos {training photos}; 4×4-blurred {blurred}"],
        "diversity": ["mean distance of two of {pictures} pictures of a class, over that of photos | ≥ 80 % "
                      "| pixels {pixels} %, judge's features {features} %",
                      "median difference to the nearest training photo | not copies "
                      "| {nearest photo, drawn}; among photos {nearest photo, photos}"],
        "residue": ["closed form of the class word alone, ten classes | Acc_g 25–75 %, Acc_a ≥ 40 % "
                    "| Acc_e {Acc_e}, Acc_g {Acc_g}, Acc_a {Acc_a} %"],
        "cosines": ["cosine to the class word: synonyms | 0.6–0.85 "
                    "| {synonyms[0]} ({synonyms[1]}–{synonyms[2]})",
                    "… associated phrases | less | {associated[0]} ({associated[1]}–{associated[2]})",
                    "… other classes | less | {other classes[0]} ({other classes[1]}–{other classes[2]})"],
        "cost": ["8 pictures, 25 steps, guidance | ≤ 8 s, ≤ 1 GiB | {8 pictures}, {peak GiB} GiB",
                 "weights, U-Net | ≤ 40 MiB, ≥ 7 M | {MiB of weights} MiB, {U-Net parameters:,} parameters"]}
    return "\n".join([*text, *("| " + row.format(**report[part]) + " |" for part, some in rows.items()
                               if part in report for row in some)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's binary version")
    parser.add_argument("--model", type=Path, default=HERE, help="model folder (default: mini/)")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for the judge, tables and grids")
    parser.add_argument("--n", type=int, default=20, help="pictures per prompt (default 20)")
    parser.add_argument("--frechet", type=int, default=2000,
                        help="pictures of the ten classes for the Fréchet distance (default 2000)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--edit", type=Path, help="draw with this edit folder, such as out/airplane")
    parser.add_argument("--steps", type=int, default=6000, help="the judge's training steps (default 6000)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.minutes = 1e9
    args.work.mkdir(parents=True, exist_ok=True)
    measure = Measure(args)
    path = args.work / f"{measure.prefix}measured.json"
    report = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for part in args.parts:
        report[part] = getattr(measure, f"measure_{part}")()
        print(part, {key: value for key, value in report[part].items() if "per " not in key}, flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(card(report), encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
