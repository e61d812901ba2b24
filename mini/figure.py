"""The model card's figure: how the training went, from the checkpoints that mini/train.py left.

    python mini/figure.py --work mini/work --out mini/training.svg

One panel per stage: the loss (gray, left) and the held-out score (blue, right); below them what the U-Net
drew on the way, a row of ten classes each time, always from seed 0.
"""
import argparse
import base64
import json
import sys
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from plumbing import UserError
from plumbing.cli import command_line
from plumbing.disk import whole

HERE = Path(__file__).resolve().parent

SCORES = {"clip": "zero-shot accuracy, 1,000 test photos", "vision": "the same, image tower alone",
          "vae": "PSNR in dB, 200 test photos", "unet": "loss on 200 test photos"}
WIDTH, HEIGHT, GAP = 240, 150, 60


def curve(points: list, x_max: float, colour: str, right: bool) -> str:
    """A polyline of [x, y] pairs scaled into the panel, with its lowest and highest y written at one side."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0
    path = " ".join(f"{WIDTH * x / x_max:.1f},{HEIGHT - HEIGHT * (y - low) / span:.1f}" for x, y in points)
    side, anchor = (WIDTH + 4, "start") if right else (-4, "end")
    ends = "".join(f'<text x="{side}" y="{y}" text-anchor="{anchor}" fill="{colour}">{value:.3g}</text>'
                   for value, y in ((high, 10), (low, HEIGHT)))
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>{ends}'


def panel(stage: str, path: Path) -> str:
    with safe_open(path, "pt") as file:
        note = file.metadata()
    log, scores = json.loads(note["log"]), json.loads(note.get("scores", "[]"))
    if not log:
        raise UserError(f"{path} holds no steps: train first")
    steps = max(log[-1][0], 1)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>',
             curve([(step, loss) for step, _, loss in log], steps, "#777", right=False)]
    if scores:
        parts.append(curve(scores, steps, "#06c", right=True))
    parts.append(f'<text y="-8"><tspan font-weight="bold">{stage}</tspan>: loss, '
                 f'<tspan fill="#06c">{SCORES[stage]}</tspan></text>'
                 f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{steps:,} steps, '
                 f'{float(note["minutes"]):.0f} minutes</text>')
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="train.py's checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "training.svg", help="default: mini/training.svg")
    args = parser.parse_args()
    stages = [stage for stage in SCORES if (args.work / f"{stage}.safetensors").exists()]
    if not stages:
        raise UserError(f"{args.work} has no checkpoint of {', '.join(SCORES)}: run mini/train.py first")
    body, height = [], 30
    for i, stage in enumerate(stages):
        x, y = GAP + i % 2 * (WIDTH + 2 * GAP), 30 + i // 2 * (HEIGHT + GAP)
        drawn = panel(stage, args.work / f"{stage}.safetensors")
        body.append(f'<g transform="translate({x},{y})">{drawn}</g>')
        height = y + HEIGHT + 30
    rows = sorted(args.work.glob("unet-*.png"))
    for path in rows[::max(1, len(rows) // 5)][-6:]:
        picture = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<text x="{GAP - 4}" y="{height + 26}" text-anchor="end">{int(path.stem[5:]):,}</text>'
                    f'<image x="{GAP}" y="{height}" width="480" height="48" '
                    f'href="data:image/png;base64,{picture}"/>')
        height += 50
    with whole(args.out) as temporary:
        temporary.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH + 4 * GAP}" '
                             f'height="{height + 10}" font-family="sans-serif" font-size="11">'
                             f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n',
                             encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    command_line(main)
