"""Retrained: a U-Net that never saw the concept, as if it were an edit. What erasing is measured against.

Unlearning wants the model that one would have had without the data (Cao and Yang 2015, "Towards Making
Systems Forget with Machine Unlearning"; Bourtoule et al. 2021, "Machine Unlearning": the retrained model is
the exact answer, and too dear). What an erased model still draws and this one does not, erasing has left.

    python mini/train.py --data emoji --stage unet --without airplane     # hours; mini/README.md
    python baselines/retrained.py --concept airplane --set unet=out/mini/unet

Nothing is computed and nothing trained here: W is the other U-Net, all of it. Text encoder and autoencoder
stay the model's own. So the word is still known, as a place in the text space; no picture goes with it.

- It needs a U-Net of the same architecture that was trained with the same text encoder and autoencoder.
- The anchor is not used: nobody chose what is drawn in the concept's place.
- W is not the model's W₀, changed, but numbers of their own. So W₀ (I + Δ) says nothing of it, and neither
  drifts nor shares are printed.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.edits import change
from plumbing.weights import check_tensors, read_tensors


@dataclass(frozen=True)
class Settings:
    unet: str = "out/mini/unet"     # the folder of the other U-Net


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    if job.preview:
        raise UserError("--preview has nothing to show here: another U-Net moves no text")
    if not Path(s.unet).is_dir():
        raise UserError(f"{s.unet} is not there: train one (mini/train.py --without), or give "
                        "--set unet=FOLDER")
    (path, W), (_, W0) = (read_tensors(Path(folder), "diffusion_pytorch_model")
                          for folder in (s.unet, job.model_folder / "unet"))
    check_tensors(path, W, {name: w.shape for name, w in W0.items()})
    if absent := W0.keys() - W.keys():
        raise UserError(f"{path} lacks {min(absent)}: this is a U-Net of another architecture")
    if (moved := change(W0, W)) == 0:
        raise UserError(f"{path} is the model's own U-Net: give another with --set unet=FOLDER")
    job.report["numbers"] = {"‖ΔW‖/‖W‖": moved}
    return W


if __name__ == "__main__":
    run("Retrained", __doc__, Settings, erase, anchor="")
