"""The model card's figure: how the training went, from the checkpoints that mini/train.py left.

    python mini/figure.py --work mini/work --out mini/training.svg

Two curves per stage: the loss and the held-out score; below them what the U-Net drew on the way, a row of ten
classes each time, always from seed 0.
"""
import argparse
import json
import sys
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from plumbing import UserError, svg
from plumbing.cli import command_line

HERE = Path(__file__).resolve().parent

SCORES = {"clip": "zero-shot accuracy, 1,000 test photos", "vision": "the same, image tower alone",
          "vae": "PSNR in dB, 200 test photos", "unet": "loss on 200 test photos"}


def curves(stage: str, path: Path) -> list[svg.Drawing]:
    """The loss of each step and the held-out scores of a stage, side by side."""
    with safe_open(path, "pt") as file:
        note = file.metadata()
    log, scores = json.loads(note["log"]), json.loads(note.get("scores", "[]"))
    if not log:
        raise UserError(f"{path} holds no steps: train first")
    title = f"{stage}: {log[-1][0]:,} steps, {float(note['minutes']):.0f} minutes"
    drawn = [svg.curve({"loss": [(step, loss) for step, _, loss in log]}, "step", "loss", title, width=420)]
    if scores:
        drawn.append(svg.curve({"held out": scores}, "step", SCORES[stage], width=420))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="train.py's checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "training.svg", help="default: mini/training.svg")
    args = parser.parse_args()
    stages = [stage for stage in SCORES if (args.work / f"{stage}.safetensors").exists()]
    if not stages:
        raise UserError(f"{args.work} has no checkpoint of {', '.join(SCORES)}: run mini/train.py first")
    drawn = [one for stage in stages for one in curves(stage, args.work / f"{stage}.safetensors")]
    rows = sorted(args.work.glob("unet-*.png"))
    if some := rows[::max(1, len(rows) // 5)][-6:]:
        drawn.append(svg.sheet([[path] for path in some], [f"{int(path.stem[5:]):,} steps" for path in some],
                               ["what the U-Net drew"], side=640))
    svg.write(args.out, *drawn)
    print(args.out)


if __name__ == "__main__":
    command_line(main)
