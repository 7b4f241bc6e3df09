"""Weight averages over several spans of one training, so that they differ in nothing else.

    python benchmarks/bench_average.py 0.02 0.03 0.065

Trains as train_gpt.py does, with the settings of the environment, and keeps beside the average over
EMA_SPAN those over the spans named. Training itself does not see any of them. The log has the BPB
of each before quantization (span_0.02 and so on); model_0.02.pt, beside model.pt, has its weights:
`QUANT_ONLY=1 CHECKPOINT_PATH=runs/NAME/model_0.02.pt python train_gpt.py` quantizes them. A resumed
run would know only the weights since then, so this refuses RESUME; train_gpt.py goes on with the
average over EMA_SPAN.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg  # noqa: E402

OneAverage = tg.EMA


class Averages(OneAverage):
    """The average of EMA_SPAN, and one for each of `spans`."""

    spans = ()
    finished = None  # the object whose training has ended

    def __init__(self, model, hp):
        super().__init__(model, hp)
        self.others = {}
        for span in self.spans:
            self.others[span] = OneAverage(model, dataclasses.replace(hp, ema_span=span))

    def update(self, step, progress):
        """Every average takes the weights after a step; see EMA."""
        super().update(step, progress)
        for other in self.others.values():
            other.update(step, progress)

    def copy_to_model(self):
        """As EMA, at the end of training, and remembers this object for the functions below."""
        super().copy_to_model()
        Averages.finished = self

    def visit(self):
        """Yields each other span with its average in the model, then puts back that of EMA_SPAN."""
        for span, other in self.others.items():
            other.copy_to_model()
            yield f"{span:g}"
        super().copy_to_model()


def save_all(path, model, hp, save=tg.save_checkpoint):
    """Writes model.pt as train_gpt.py does, then model_<span>.pt for every other span."""
    save(path, model, hp)
    for span in Averages.finished.visit():
        of_span = dataclasses.replace(hp, ema_span=float(span))
        save(path.with_name(f"{path.stem}_{span}.pt"), model, of_span)


def score_all(name, evaluate, log, scores, score=tg.score_stage):
    """A stage's score as in train_gpt.py; before quantization also that of every other span."""
    score(name, evaluate, log, scores)
    if name == "prequant" and Averages.finished:
        for span in Averages.finished.visit():
            score(f"span_{span}", evaluate, log, {})


def share(text):
    """A span of the command line. ValueError if train_gpt.py would refuse it as EMA_SPAN."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spans", type=share, nargs="+", help="shares of training, at most 1")
    Averages.spans = parser.parse_args().spans
    if os.environ.get("RESUME", "0") not in ("", "0"):
        parser.error("RESUME does not go with several averages: resume with train_gpt.py")
    sys.argv = [tg.__file__]  # which the guard names where it says how to go on
    tg.EMA = Averages
    tg.save_checkpoint = save_all
    tg.score_stage = score_all
    tg.main()


if __name__ == "__main__":
    main()
