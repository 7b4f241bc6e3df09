"""Writes text with the model of a run, token by token: a look at what was trained.

usage: python tools/sample.py runs/<RUN_ID> --prompt "The module"      # from artifact.bin
       python tools/sample.py runs/<RUN_ID> --checkpoint               # from model.pt, no prompt

Settings come from the run's log, the forward pass from train_gpt.py, with presets/published.py
where the run used it, and without test-time training. A prompt follows BOS, as every document of
training does, and is shown as the tokenizer read it. A sample ends at --tokens, or where the model
begins another document. The model sees the last TRAIN_SEQ_LEN tokens. Keys and values are not kept:
every token runs the whole context again, which is simple, and quick enough for a few hundred
tokens. Nothing in the run's folder is changed.
"""

import argparse
import dataclasses
import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("sample.py")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import presets.published as published  # noqa: E402
import train_gpt  # noqa: E402
from lossless_caps import ALLCAPS, CAPNEXT, ESC, TITLE, decode  # noqa: E402
from prepare_caseops_data import DataError, encode_document, load_tokenizer  # noqa: E402
from tools.run_files import (  # noqa: E402
    FOLDER,
    MODE,
    RunError,
    published_settings,
    read_settings,
    script_of,
)

BOS_ID = train_gpt.BOS_ID
PAIRS = dict(zip(train_gpt.PAIR_IDS, train_gpt.CASE_MARKERS, strict=True))  # id -> its marker
REPLACEMENT = "\ufffd"  # what SentencePiece shows for bytes that are no character yet
# Settings of the run that do not fit the machine or the moment here. The references of the
# operations run everywhere and suit one row that grows.
HERE = {"KERNELS": "0", "ATTENTION_BACKEND": "sdpa", "COMPILE": "0"}

# What is wrong with the run, its data or the prompt (which UTF-8 may not hold)
ERRORS = *train_gpt.OUR_ERRORS, RunError, DataError, UnicodeError

# ---- text


class Text(NamedTuple):
    """How a run's data hold text: ids of documents, and text of ids."""

    tokenizer: object  # a SentencePieceProcessor
    caseops: bool  # capitals are markers before small letters (lossless_caps.py)
    space: int | None = None  # the space's id, where it and a marker behind it are one id

    def encode(self, prompt):
        """Text -> ids, BOS first. DataError or UnicodeError where UTF-8 cannot hold the text."""
        if self.caseops:
            ids = encode_document(self.tokenizer, prompt).astype(np.int64)
        else:
            ids = np.array([BOS_ID, *self.tokenizer.encode(prompt)])
        if self.space is not None:
            ids, _ = train_gpt.fuse_markers(ids, np.zeros_like(ids), self.space)
        return [int(token) for token in ids]

    def decode(self, ids):
        """Ids -> text, also of ids that no text has: markers that mark nothing are left out."""
        plain = []
        for token in ids:
            fused = self.space is not None and token in PAIRS
            plain += [self.space, PAIRS[token]] if fused else [token]
        text = self.tokenizer.decode(plain)
        return decode(mend_markers(text)) if self.caseops else text


_MARKERS = re.compile(f"{ESC}[^{ESC}]|{ESC}{ESC}|{ESC}|[{TITLE}{ALLCAPS}{CAPNEXT}]+", re.DOTALL)


def mend_markers(text):
    """Transformed text as a model writes it -> text that lossless_caps.decode can read.

    What lossless_caps.encode made comes out as it was. Of markers in a row the last one stays, if
    it stands before a letter, and TITLE and ALLCAPS only where that letter begins its word.
    """

    def mended(match):
        found = match[0]
        if found.startswith(ESC):
            return found if len(found) > 1 else ""
        before = text[max(0, match.start() - 1) : match.start()]
        after = text[match.end() : match.end() + 1]
        if not is_letter(after) or (is_letter(before) and found[-1] != CAPNEXT):
            return ""
        return found[-1]

    return _MARKERS.sub(mended, text)


def is_letter(char):
    """Whether the transform of capitals takes a character, or none, for a letter."""
    return char.isascii() and char.isalpha()


# ---- run


def settings_of_run(folder):
    """Folder of a run -> its settings {NAME: text}, path of the tokenizer that its log names.

    A run that has not ended has them, too. Settings that this version lacks and the run left at
    their defaults are left out, with a line on standard error: as a rule the default has become a
    constant. Raises RunError where there is no run, and for a changed setting that is gone.
    """
    path = Path(folder) / "log.txt"
    if not path.is_file():
        raise RunError(f"{folder}: no such run: there is no log.txt")
    text = path.read_text(encoding="utf-8", errors="replace")
    settings, changed = read_settings(text.splitlines())
    tokenizers = re.findall(r"^parameters:.* tokenizer:(.+?) validation ", text, re.MULTILINE)
    if not settings or not tokenizers:
        raise RunError(f"{path}: no table of settings and no tokenizer: the run did not begin")
    known = published_settings() | {
        field.name.upper() for field in dataclasses.fields(train_gpt.Hyperparameters)
    }
    gone = settings.keys() - known
    if lost := sorted(gone & {*changed}):
        raise RunError(
            f"{path}: the run changed {', '.join(lost)}, which this version lacks: check out the"
            " version that made it"
        )
    if gone:
        names = ", ".join(sorted(gone))
        command_line.tell(f"sample.py: defaults of settings that are gone, left out: {names}")
    kept = {name: value for name, value in settings.items() if name in known}
    return kept, Path(tokenizers[-1])


def hyperparameters(settings, device, tokenizer):
    """A run's settings {NAME: text}, as they suit this place -> Hyperparameters.

    Puts the parts of presets/published.py into train_gpt where the run used that script.
    """
    if script_of(settings).name == "published.py":
        published.install()
    kept = {name: value for name, value in settings.items() if name not in FOLDER | MODE}
    kept |= HERE | {"DEVICE": device}
    kept.setdefault("MARKER_FUSION_ENABLED", "0")  # a run without it is older than the setting
    if tokenizer:
        kept["TOKENIZER_PATH"] = tokenizer
    try:
        return train_gpt.Hyperparameters.from_env(kept)
    except train_gpt.SettingError as error:
        problems = str(error).replace("\n", "; ")
        raise RunError(
            "the run's settings are not those of this version, check out the one that made it:"
            f" {problems}"
        ) from None


def text_of_run(hp, logged):
    """Settings and the path of the run's tokenizer, if it is known -> Text.

    Raises DataError for a tokenizer that is missing or did not make the run's data.
    """
    try:
        path = train_gpt.find_tokenizer(hp)
    except train_gpt.DataError as error:
        raise train_gpt.DataError(f"{error}: name the run's tokenizer with --tokenizer") from None
    if not hp.tokenizer_path and path.name != logged.name:
        raise train_gpt.DataError(
            f"the run's tokenizer was {logged}, found was {path}: name it with --tokenizer"
        )
    caseops = getattr(hp, "caseops_enabled", True)
    if not caseops:
        return Text(train_gpt.load_tokenizer(hp), caseops)
    tokenizer = load_tokenizer(path)
    return Text(tokenizer, caseops, train_gpt.space_id(hp) if hp.fuses_markers else None)


def load_model(hp, folder, checkpoint):
    """The run's model from artifact.bin, or from model.pt, on the device of the settings.

    Raises RunError where the run has no such file, and the errors of train_gpt for a damaged one.
    """
    path = Path(folder) / ("model.pt" if checkpoint else "artifact.bin")
    if not path.is_file():
        other = "without" if checkpoint else "with"
        raise RunError(
            f"{folder} has no {path.name}: the run has not come to it; try {other} --checkpoint"
        )
    dist = train_gpt.Dist(hp.device)
    model = train_gpt.build_model(hp, dist)
    if checkpoint:
        train_gpt.load_checkpoint(path, model)
    else:
        train_gpt.rebuild_model(model, path, dist)
    model.leave_training()
    return model


# ---- sampling


def next_token_logits(model, ids):
    """Ids so far -> logits (V,) of the next one, float32 on the CPU."""
    hp = model.hp
    context = torch.tensor([ids[-hp.train_seq_len :]], device=model.tok_emb.device)
    hidden = model.forward_hidden(context, max_seqlen=context.size(1), looping=True)
    logits = train_gpt.linear(hidden[0, -1].float(), model.head_weight, None, "lm_head")
    if not logits.isfinite().all():
        raise RunError("the model's outputs are not finite: the training went wrong")
    return (hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)).cpu()


def pick(logits, temperature, top_p, generator):
    """Logits (V,) -> an id, among the likeliest ones that together reach top_p.

    temperature 0: the likeliest.
    """
    if temperature == 0:
        return int(logits.argmax())
    shares, order = torch.sort((logits.double() / temperature).softmax(0), descending=True)
    beyond = shares.cumsum(0) - shares >= top_p
    beyond[0] = False
    shares[beyond] = 0
    return int(order[torch.multinomial(shares, 1, generator=generator)])


@torch.no_grad()
def sample(model, ids, count, choose):
    """Yields up to `count` ids that follow `ids`; none after the model has ended the document.

    choose: logits (V,) -> id.
    """
    ids = list(ids)
    for _ in range(count):
        token = choose(next_token_logits(model, ids))
        if token == BOS_ID:
            return
        ids.append(token)
        yield token


def growing_text(text, ids, tokens):
    """Ids, and those that follow one by one -> parts of their text, each when it is certain.

    Bytes that are no whole character yet wait for the next ones.
    """
    ids = list(ids)
    shown = text.decode(ids).rstrip(REPLACEMENT)
    yield shown
    for token in tokens:
        ids.append(token)
        known = text.decode(ids).rstrip(REPLACEMENT)
        if len(known) > len(shown):
            yield known[len(shown) :]
            shown = known
    yield text.decode(ids)[len(shown) :]


# ---- command line


def number(kind, least, most=None):
    """An argparse type: a number of that kind within these bounds."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= (value if most is None else most):
            bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bounds}")
        return value

    return parse


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    add = functools.partial(parser.add_argument, metavar="N")
    add("--prompt", action="append", metavar="TEXT", help="begins the document; may be repeated")
    add("--count", type=number(int, 1), default=1, help="samples for each prompt")
    add("--tokens", type=number(int, 1), default=200, help="at most so many in a sample")
    add("--temperature", type=number(float, 0, 100), default=0.8, help="0: always the likeliest")
    add("--top-p", type=number(float, 0, 1), default=0.95, help="among those that reach this share")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed, same samples")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", metavar="NAME", help="or cpu")
    add("--tokenizer", metavar="MODEL", help="of the run's data, where it is not found")
    parser.add_argument("--checkpoint", action="store_true", help="model.pt, before quantization")
    return parser.parse_args(arguments)


def write_samples(options):
    """Loads the run's model and writes all samples to standard output, a line between them."""
    settings, logged = settings_of_run(options.run)
    hp = hyperparameters(settings, options.device, options.tokenizer)
    text = text_of_run(hp, logged)
    prompts = [text.encode(prompt) for prompt in options.prompt or [""]]
    model = load_model(hp, options.run, options.checkpoint)
    generator = torch.Generator().manual_seed(options.seed)
    choose = functools.partial(
        pick, temperature=options.temperature, top_p=options.top_p, generator=generator
    )
    is_first = True
    for ids in prompts:
        for _ in range(options.count):
            if not is_first:
                print("-" * 40)
            is_first = False
            tokens = sample(model, ids, options.tokens, choose)
            for part in growing_text(text, ids, tokens):
                print(part, end="", flush=True)
            print(flush=True)


def main(arguments=None):
    """Command line; an error of the run, the data or the prompt ends it with one sentence."""
    try:
        write_samples(parse_arguments(arguments))
    except ERRORS as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    command_line.run(main, "sample.py")
