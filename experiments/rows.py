"""The rows of frontier.py's tables: each method with its settings and its strengths, mostly six.

    python experiments/frontier.py --row "closed form" "RealEra, expected" "ESD-x, authors'"

“noise alignment” sweeps its learning rate and steps, beside none, with the paper's target and with where the
closed form sends the concept. "NAME, authors'" has its authors' own settings, in SD's units (AC and SA: fewer
pictures, SA fewer steps), and nothing to choose; "NAME, corrected" is NAME without the oddities of its
authors' code (as_published=false). "retrained" is a U-Net that was trained without the one class asked for.
"""
from experiments.tables import CLOSED, METHODS, PRINTED_WAY

UCE = [f"lamb={x}" for x in (30000, 10000, 3000, 1000, 100, 0.5)]           # the last is the authors'
# A row: the method's file, its settings, and its strengths, the weakest first. RealEra's have no noise
# alignment, which at the paper's rate adds nothing (docs/results.md) and takes a minute an edit. The
# tolerance of "as printed" is smaller than D1, as section 4.1 has it; how much, it does not say; its last
# strength is the paper's λ1. All closed forms have the same P, the book's preserved nouns, but for rows that
# say so; SLD's warm-ups are for 12 steps.
ROWS = {
    "closed form": ("realera.py", CLOSED, [f"lambda1={x}" for x in (300, 100, 30, 10, 3, 0.1)]),
    "reach": ("realera.py", [*CLOSED, "lambda1=0.1"], [f"reach={x}" for x in (0.4, 0.6, 0.8, 1.25, 1.5, 2)]),
    "RealEra, as printed": ("realera.py", [*PRINTED_WAY, "lora_steps=0"],
                            [f"lambda1={x}" for x in (100, 50, 30, 15, 5, 0.1)]),
    "RealEra, expected": ("realera.py", ["lora_steps=0", "mining=expected", "tolerance=same"],
                          [f"lambda1={x}" for x in (100, 50, 30, 15, 5, 1)]),
    "vocabulary": ("baselines/vocabulary.py", ["measured=false"],
                   [f"reach={x}" for x in (1, 1.5, 2, 3, 4, 6)]),
    "vocabulary, no contrast": ("baselines/vocabulary.py", ["measured=false", "contrast=0"],
                                [f"reach={x}" for x in (0.8, 1, 1.25, 1.5, 2, 3)]),
    "vocabulary, all words": ("baselines/vocabulary.py", [], [f"reach={x}" for x in (1, 1.5, 2, 3, 4, 6)]),
    "UCE": ("baselines/uce.py", ["retain=nouns"], UCE),
    "UCE, nothing retained": ("baselines/uce.py", [], UCE)}
MINING = list(ROWS)             # the default; most of the others are trained, which takes minutes a try
ROWS |= {
    "RealEra, sampled": ("realera.py", ["lora_steps=0"], [f"lambda1={x}" for x in (100, 50, 40, 30, 15, 5)]),
    "reach, with a lid": ("realera.py", [*CLOSED, "lambda1=0.1", "lid=1"],
                         [f"reach={x}" for x in (1.25, 1.5, 2, 2.5, 3, 4)]),
    "SPEED": ("baselines/speed.py", ["rows=tail", "retain=nouns"],
              [f"threshold={x}" for x in (0.001, 0.01, 0.1, 1, 10, 100)]),
    "RECE": ("rece.py", ["real_prompts=true"], [f"rounds={x}" for x in (0, 1, 2, 3, 5, 8)]),
    "MACE": ("baselines/mace.py", [], [f"lr={x}" for x in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)]),
    "ESD-x": ("baselines/esd.py", ["preset=mini"],
              [f"lr={x}" for x in (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3)]),
    "ESD-u": ("baselines/esd.py", ["preset=mini-u"],
              [f"lr={x}" for x in (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3)]),
    "AC": ("baselines/ac.py", [], [f"lr={x}" for x in (1.6e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)]),
    "FMN": ("baselines/fmn.py", [], [f"lr={x}" for x in (2e-6, 1e-5, 3e-5, 6e-5, 1.2e-4, 2e-4)]),
    "SA": ("baselines/sa.py", ["preset=mini"], [f"lr={x}" for x in (1.6e-4, 4e-4, 1e-3, 2e-3, 4e-3, 1e-2)]),
    "SPM": ("baselines/spm.py", ["preset=mini"], [f"lr={x}" for x in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)]),
    "SLD": ("baselines/sld.py", [],
            ["preset=weak warmup=4", "preset=medium warmup=2", "preset=strong warmup=2",
             "preset=strong warmup=0", "preset=max", "preset=max scale=20000"]),
    "Surgery": ("baselines/surgery.py", [], [f"beta={x}" for x in (-0.24, -0.12, -0.06, -0.03, 0, 0.03)])}
RATES = ["lora_steps=0", "lora_steps=200 lr=1e-5",                # none, the paper's
         *(f"lora_steps={n} lr={lr}" for n in (200, 1000, 2000) for lr in (5e-5, 1e-4, 5e-4))]
ROWS |= {f"noise alignment, {aim}": ("realera.py", [f"aim={aim}"], RATES) for aim in ("anchor", "closed")}
ROWS |= {f"{name}, corrected": (file, [*settings, "as_published=false"], strengths)
         for name, (file, settings, strengths) in ROWS.items()
         if name in ("ESD-x", "ESD-u", "AC", "FMN", "SA", "SPM", "MACE", "SPEED")}
AUTHORS = {f"{name}, authors'": method for name, method in METHODS.items() if name != "RealEra"}
ROWS |= {name: (file, settings, [""]) for name, (file, settings, *_) in AUTHORS.items()}
ROWS |= {"RealEra, default": ("realera.py", [], [""]),
         "retrained": ("baselines/retrained.py", ["unet=out/mini/unet"], [""])}
# Of a row, or of all rows with the name before the comma. Anchors: their authors'; of others the book's.
ANCHOR = {"SPM": "", "Surgery": "", "retrained": ""} | {
    name: anchor[0] for name, (_, _, *anchor) in AUTHORS.items() if anchor}
RANDOM = {"RealEra, as printed", "RealEra, sampled", "RealEra, default", "SPEED"}    # four seeds of the edit
TRAINED = {"MACE", "ESD-x", "ESD-u", "AC", "FMN", "SA", "SPM", "noise alignment"}    # three, on three classes


def names_of(row: str) -> set[str]:
    """A row's own name, and the one before its comma."""
    return {row, row.partition(",")[0]}


def own_anchor(row: str) -> str | None:
    """The authors' anchor of a row; None where it has none of its own."""
    return next((ANCHOR[name] for name in names_of(row) & ANCHOR.keys()), None)
