"""train_gpt.py with ideas of the recipe that are not in it, for screens and finals.

    TRIALS=cautious,wdend MATRIX_LR=0.034 SEED=4 ... python benchmarks/trials.py

TRIALS names functions of this file, separated by commas; each replaces a part of train_gpt.py.
Everything else, settings included, is train_gpt.py's, and so is the script in the run's folder:
RESULT states the trials among the violations, as that script would train another model. An idea
that wins moves to train_gpt.py, one that loses leaves; both are in docs/LOG.md.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg  # noqa: E402


def wdend():
    """Weight decay falls linearly to 0 over the training."""
    tg.decay_multiplier = lambda progress, hp: 1.0 - progress


def cautious():
    """Muon's weight decay acts only where it and the step shrink a weight (arXiv:2510.12402).

    It comes after the radial brake has set the norms.
    """
    plain = tg.step_matrices

    def step_matrices(bank, update, lr, decay, outward):
        shrinks = update * bank > 0
        plain(bank, update, lr, 0.0, outward)
        bank.mul_(torch.where(shrinks, 1 - decay, 1.0))

    tg.step_matrices = step_matrices


TRIALS = {trial.__name__: trial for trial in (wdend, cautious)}


def note_trials(names):
    """RESULT and the log of the run say what was tried."""
    plain = tg.violations

    def violations(*args):
        return [*plain(*args), f"TRIALS={names} are not in the packed script"]

    tg.violations = violations


def main():
    # a command to continue a run has only settings of train_gpt.py: it must not lose the trials
    if "TRIALS" not in os.environ:
        sys.exit(f"{__doc__}\nTRIALS must be set; there are {', '.join(TRIALS)}")
    names = [name.strip() for name in os.environ["TRIALS"].split(",") if name.strip()]
    if unknown := set(names) - set(TRIALS):
        sys.exit(f"TRIALS: no {', '.join(sorted(unknown))}; there are {', '.join(TRIALS)}")
    for name in names:
        TRIALS[name]()
    if names:
        note_trials(",".join(names))
    print(f"trials: {', '.join(names) or 'none'}", flush=True)
    tg.main()


if __name__ == "__main__":
    main()
