"""The live line of a run on a terminal; train_gpt.py uses it in its repository, a packed script goes without."""

import shutil
import time


class LiveLine:
    """The running stage, its bar, seconds left; whatever is printed next, after `erase`, takes its place."""

    erase = "\r\x1b[K"

    def __init__(self):
        self.shown, self.stage = 0.0, None

    def show(self, name, start, share, detail):
        """Stage and when it began (perf_counter), share done, words; a new stage at once, else five times a second."""
        now = time.perf_counter()
        if self.stage != (name, start) or now - self.shown > 0.2:
            self.shown, self.stage = now, (name, start)
            left = (now - start) * (1 / share - 1) if share else 0.0
            bar = f"[{'#' * round(30 * share):.<30}] {share:4.0%}  {left:.0f} s left  {detail}" if share else "..."
            print(self.erase + f"{name} {bar}"[: shutil.get_terminal_size().columns - 1], end="", flush=True)
