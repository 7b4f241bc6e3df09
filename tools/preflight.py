"""What is checked and told before the clock starts; train_gpt.py uses it in its repository, a packed script does not.

Settings: ranges, combinations, names that look like ours. Dataset: its manifest, its tokenizer, whether it is the
contest's. Machine: a coder that works. Code: packed, and the commit it is of.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from tools.run_files import SettingError, read_preset

ROOT = Path(__file__).resolve().parents[1]
MAX_FP16_ELEMENTS = 65_536  # a tensor with more elements must have a role in QUANT_TABLE
MAX_RAW_BYTES, MAX_DIMENSIONS = 2**30, 8  # of an artifact's arrays
ARRAY_DTYPES = "bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
BOS_ID = 1  # train_gpt.py has it as well: a packed script goes without this file
# FineWeb's documents and values; targets that whole windows of 2,048 tokens hold, and the bytes of these
CANONICAL = 50_000, 47_853_344, 47_851_520, 151_074_499


class DataError(ValueError):
    """A dataset or a file that cannot be used as it is; the message names it and what to do."""


class ArtifactError(ValueError):
    """The bytes are no artifact of this program, or a damaged one."""


# ---- settings


def preset_note(hp):
    """A line for the log: what the run's preset says, and which of it the environment has set otherwise."""
    given = read_preset(hp.preset)
    texts = {field.name.upper(): (field.type, getattr(hp, field.name)) for field in dataclasses.fields(hp)}
    other = [f"{name}={value} (preset {given[name]})" for name, (kind, value) in texts.items()
             if name in given and value != (given[name] == "1" if kind is bool else kind(given[name]))]  # fmt: skip
    settings = " ".join(f"{name}={value}" for name, value in given.items())
    return f"preset {hp.preset}: {settings}\npreset {hp.preset}, set otherwise: {', '.join(other) or 'nothing'}"


def limits(field):
    """The declared range of a setting, for the table: ` [above 0, most 1]`, or nothing."""
    rule = field.metadata
    bounds = [f"{key} {rule[key]}" for key in ("above", "least", "most") if rule[key] is not None]
    text = ", ".join([*bounds, "|".join(rule["choices"] or ())]).strip(", ")
    return text and f" [{text}]"


def setting_problems(hp, sites):
    """Messages for values outside their ranges or, where there are none, for combinations that cannot work."""
    outside = [p for field in dataclasses.fields(hp) for p in range_problems(field, getattr(hp, field.name))]
    return outside or [message for broken, message in cross_checks(hp, sites) if broken]


def range_problems(field, value):
    """Messages for a value outside its declared range."""
    rule, name = field.metadata, f"{field.name.upper()}={value!r}"
    if rule["choices"] and value not in rule["choices"]:
        yield f"{name}: must be one of {', '.join(rule['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: must be finite"
    elif rule["above"] is not None and not value > rule["above"]:
        yield f"{name}: must be above {rule['above']}"
    elif rule["least"] is not None and value < rule["least"]:
        yield f"{name}: must be at least {rule['least']}"
    elif rule["most"] is not None and value > rule["most"]:
        yield f"{name}: must be at most {rule['most']}"


def cross_checks(hp, sites):
    """Pairs (is it broken, what to change) for combinations of settings; `sites`: where adapters may sit."""
    yield hp.model_dim % hp.num_heads, f"MODEL_DIM={hp.model_dim} must divide by NUM_HEADS={hp.num_heads}"
    yield hp.num_heads % hp.num_kv_heads, "NUM_HEADS must divide by NUM_KV_HEADS"
    yield hp.rope_dims % 2 or hp.rope_dims > hp.head_dim, f"ROPE_DIMS must be even, at most {hp.head_dim}"
    yield hp.gate_window > hp.model_dim, "GATE_WINDOW must be at most MODEL_DIM"
    gates = hp.sparse_attn_gate_enabled + hp.gated_attn_enabled + hp.attn_out_gate_enabled
    yield gates > 1, "SPARSE_ATTN_GATE_ENABLED, GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED exclude each other"
    looped = hp.loop_start <= hp.loop_end < hp.num_layers
    yield hp.num_loops and not looped, "LOOP_START..LOOP_END must lie inside NUM_LAYERS (or set NUM_LOOPS=0)"
    yield hp.parallel_start_layer > hp.num_layers, "PARALLEL_START_LAYER must be at most NUM_LAYERS"
    yield hp.train_batch_tokens % hp.micro_batch_tokens, "TRAIN_BATCH_TOKENS must divide by MICRO_BATCH_TOKENS"
    pieces = -(-hp.micro_batch_tokens // hp.train_seq_len)
    yield 0 < hp.max_row_segments < pieces, (
        f"MAX_ROW_SEGMENTS={hp.max_row_segments}: a row of MICRO_BATCH_TOKENS has {pieces} pieces of TRAIN_SEQ_LEN")
    out_of_time = 0 < hp.max_wallclock_seconds <= hp.gptq_reserve_seconds
    yield out_of_time, "GPTQ_RESERVE_SECONDS must be less than MAX_WALLCLOCK_SECONDS"
    yield hp.eval_stride > hp.eval_seq_len, "EVAL_STRIDE must be at most EVAL_SEQ_LEN"
    yield hp.ttt_chunk_size > hp.ttt_eval_seq_len, "TTT_CHUNK_SIZE must be at most TTT_EVAL_SEQ_LEN"
    fits = hp.ttt_chunk_size <= hp.ttt_stale_context <= hp.ttt_eval_seq_len - hp.ttt_chunk_size
    what = "must be 0, or from TTT_CHUNK_SIZE to TTT_EVAL_SEQ_LEN less that"
    yield hp.ttt_stale_context and not fits, f"TTT_STALE_CONTEXT={hp.ttt_stale_context} {what}"
    pairs = re.fullmatch(r"(\d+:[1-9]\d*(,(?=.)|$))*", hp.ttt_short_chunks)
    yield not pairs, f"TTT_SHORT_CHUNKS={hp.ttt_short_chunks}: must be pairs such as 256:8,2000:24"
    known = hp.lora_sites and set(hp.lora_sites) <= set(sites)
    yield not known, f"TTT_LORA_SITES={hp.ttt_lora_sites}: must be some of {','.join(sites)}"
    yield hp.marker_fusion_enabled > hp.caseops_enabled, "MARKER_FUSION_ENABLED=1 needs CASEOPS_ENABLED=1"
    stale = hp.ttt_stale_context and hp.ttt_enabled and hp.ttt_method == "lora"
    yield stale and (hp.attn_window or hp.new_values), (
        "ATTN_WINDOW, PARTIAL_KEY_OFFSET, VALUE_RESIDUAL and VALUE_EMBED_LAYERS need TTT_STALE_CONTEXT=0")
    layers = hp.value_embed_layers.split(",") if hp.value_embed_layers else []
    known = all(layer.isdecimal() and int(layer) < hp.num_layers for layer in layers)
    yield not known, f"VALUE_EMBED_LAYERS={hp.value_embed_layers}: must be numbers of layers, below NUM_LAYERS"
    yield hp.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE must be 2 at least, or 0"
    yield hp.extra_eval_loops and not hp.num_loops, "EXTRA_EVAL_LOOPS needs NUM_LOOPS"
    odd = hp.num_heads % 2 or hp.num_kv_heads % 2
    yield hp.muon_head_pairs and odd, "MUON_HEAD_PAIRS=1 needs even NUM_HEADS and NUM_KV_HEADS"
    yield hp.qat_below_lr and hp.gptq_column_steps, "QAT_BELOW_LR trains on the grid of rows: set GPTQ_COLUMN_STEPS=0"
    yield hp.ttt_method == "sgd" and hp.ttt_max_docs, "TTT_MAX_DOCS goes with TTT_METHOD=lora"
    modes = hp.prequant_only + hp.quant_only + hp.ttt_eval_only
    yield modes > 1, "PREQUANT_ONLY, QUANT_ONLY, TTT_EVAL_ONLY exclude each other"
    goes_on = hp.run_id and not (hp.quant_only or hp.ttt_eval_only)
    yield hp.resume and not goes_on, "RESUME=1 needs RUN_ID, and neither QUANT_ONLY nor TTT_EVAL_ONLY"
    yield hp.deterministic and hp.max_wallclock_seconds, "DETERMINISTIC=1 needs MAX_WALLCLOCK_SECONDS=0"
    yield hp.checkpoint_path and not hp.quant_only, "CHECKPOINT_PATH goes with QUANT_ONLY=1"
    yield hp.artifact_path and not hp.ttt_eval_only, "ARTIFACT_PATH goes with TTT_EVAL_ONLY=1"
    yield not re.fullmatch(r"(\w[\w.+-]*)?", hp.run_id), "RUN_ID: letters, digits, '_', then also '.', '+', '-'"


# Names of published training scripts that do nothing here -> what does. Other unknown names are found by their family.
INSTEAD = {
    "ADAM_EPS": "nothing: it is 1e-8", "ALIAS_PREV_SMEAR_SCALE": "nothing", "ASYM_LOGIT_RESCALE": "nothing",
    "CKPT_PATH": "CHECKPOINT_PATH", "EVAL_ONLY": "TTT_EVAL_ONLY", "EVAL_ONLY_PATH": "QUANT_ONLY and CHECKPOINT_PATH",
    "DATASETS_DIR": "DATA_PATH", "DOC_SHUFFLE": "DOC_SHUFFLE_ENABLED", "E2E_TTT_ENABLED": "TTT_METHOD=sgd",
    "FULL_GPTQ_DAMP": "GPTQ_DAMP", "FUSED_CE_ENABLED": "KERNELS", "FUSED_MLP_ENABLED": "KERNELS",
    "HEAD_LR": "TIED_EMBED_LR", "HEAD_PAIR_NS": "MUON_HEAD_PAIRS", "IHA_ENABLED": "nothing", "IHA_MIX_V": "nothing",
    "LATE_QAT_THRESHOLD": "QAT_BELOW_LR", "LOAD_MODEL_PATH": "QUANT_ONLY and CHECKPOINT_PATH", "MTP_ENABLED": "nothing",
    "MTP_LOSS_WEIGHT": "nothing", "MTP_NUM_HEADS": "nothing", "MTP_STEPS": "nothing", "MTP_WEIGHT": "nothing",
    "NEGATIVE_SLOPE": "LEAKY_RELU_SLOPE", "PAIRED_HEAD_MUON_ENABLED": "MUON_HEAD_PAIRS", "PRUNE_PCT": "TARGET_BYTES",
    "QUANTIZED_MODEL_PATH": "TTT_EVAL_ONLY and ARTIFACT_PATH", "QUANTIZE_ONLY": "QUANT_ONLY", "RECUR_ALPHA": "nothing",
    "SKIP_POST_TRAIN_EVAL": "PREQUANT_ONLY", "SPINQUANT_ENABLED": "nothing", "TARGET_MB": "TARGET_BYTES",
    "TOKEN_BOOST": "NGRAM_TILT_ENABLED", "TOKEN_ORDER": "NGRAM_TILT_ENABLED", "TOKEN_THRESHOLD": "NGRAM_TILT_ENABLED",
    "TRAIN_SEQ_SCHEDULE": "TRAIN_SEQ_LEN", "VAL_BATCH_SIZE": "MICRO_BATCH_TOKENS",
    "VAL_BATCH_TOKENS": "MICRO_BATCH_TOKENS", "VAL_DOC_FRACTION": "TTT_MAX_DOCS", "VE_DIM": "VALUE_EMBED_DIM",
    "VE_ENABLED": "VALUE_EMBED_LAYERS", "VE_LAYERS": "VALUE_EMBED_LAYERS",
}  # fmt: skip
# Names that change no result, or that other programs use as well: a note of the log, no refusal.
IDLE = """ARTIFACT_DIR COMPILE_SHAPE_WARMUP DATA_DIR DYNAMO_CACHE_SIZE_LIMIT GPUS_OVERRIDE MODEL_PATH OUT_PTZ
    SEEDS_OVERRIDE SKIP_INITIAL_VAL""".split()


def idle_notes(environ):
    """Notes for the log: which settings of published scripts do nothing here."""
    found = [name for name in IDLE if name in environ]
    return [f"{', '.join(found)}: of published scripts, without a meaning here"] if found else []


def unknown_settings(environ, cls):
    """Messages for undeclared variables that look like ours: a family name of ours, or nearly one of our names.

    First words that other programs use as well (MAX_JOBS, DATA_..., RUN_...) do not make a family by themselves.
    """
    ours = [field.name.upper() for field in dataclasses.fields(cls)]
    shared_words = "MAX MIN NUM RUN RUNS DATA MODEL COMPUTE ENABLE TRAIN VAL CHECKPOINT TOKENIZER ARTIFACT ADAM".split()
    families = {name.split("_")[0] for name in ours if "_" in name} - set(shared_words)
    for name in sorted(set(environ) - {*ours, *IDLE}):
        if name in INSTEAD:
            yield f"{name} is a setting of other scripts; here it is {INSTEAD[name]} (unset it, or see --help)"
            continue
        close = difflib.get_close_matches(name, ours, 1, 0.6)
        if name.split("_")[0] in families or difflib.get_close_matches(name, ours, 1, 0.88):
            yield f"{name} is not a setting{f'; did you mean {close[0]}?' if close else ''} (unset it, or see --help)"


# ---- data


def check_side_car(folder, paths, parts, shards):
    """DataError unless the side-car's parts are there and as long as the shards."""
    if not paths:
        raise DataError(f"no fineweb_val_bytes_*.bin in {folder}: BPB needs the side-car")
    if [len(part) for part in parts] != [len(shard) for shard in shards]:
        raise DataError(
            f"{paths[0]}: side-car lengths {[len(p) for p in parts]} differ from the shards' "
            f"{[len(s) for s in shards]}: they are not of one export"
        )


def read_manifest(folder):
    """manifest.json of a dataset, {} where there is none. DataError unless all that is read of it has its type."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        hash(manifest.get("tokenizer", {}).get("sha256"))
        if manifest.get("format") == "caseops_shards":
            values = [about["values"] + len(about["sha256"]) for about in manifest["files"].values()]
            sum(values, manifest["leaked_documents"] + len({**manifest["splits"]["val"]}))
        return manifest
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}/manifest.json is damaged ({error!r}): fetch or make the dataset again") from None


def check_data_settings(hp):
    """DataError where the settings contradict the side-car or the manifest: the bytes would be wrong."""
    folder = Path(hp.data_path)
    manifest, wrong = read_manifest(folder), []
    side_car = next((path.name for path in sorted(folder.glob("fineweb_val_bytes_*.bin"))), None)
    if side_car and not hp.caseops_enabled:
        wrong.append(f"{side_car} holds the bytes of its tokens, which CASEOPS_ENABLED=0 would not read: set it to 1")
    transform = manifest.get("text_transform")
    if transform and not hp.caseops_enabled:
        wrong.append(f"its manifest says {transform}, whose tokens a tokenizer cannot count: set CASEOPS_ENABLED=1")
    if "text_transform" in manifest and not transform and hp.caseops_enabled:
        wrong.append("its manifest says that the text was not transformed: set CASEOPS_ENABLED=0")
    size = manifest.get("tokenizer", {}).get("vocab_size", hp.vocab_size)
    if size != hp.vocab_size:
        wrong.append(f"its manifest says VOCAB_SIZE={size}, not {hp.vocab_size}")
    if wrong:
        raise DataError(f"{folder}: {'; '.join(wrong)}")


def check_manifest(hp, found, read_shard):
    """DataError where the dataset is not what its manifest says, so that no BPB of other data is reported.

    `found` counts what the validation files hold. These are hashed; of training files only the lengths are checked,
    because hashing them takes minutes (`prepare_caseops_data.py verify` does).
    """
    manifest = read_manifest(hp.data_path)
    if manifest.get("format") != "caseops_shards":
        return
    stated, files = manifest["splits"]["val"], manifest["files"]
    wrong = [
        f"{count} {name} of validation, not {stated.get(name)}"
        for name, count in found.items()
        if stated.get(name) != count
    ]
    paths = {os.path.basename(path): path for path in Path(hp.data_path).glob("fineweb_*.bin")}
    wrong += [f"{name} is missing" for name in files.keys() - paths.keys()]
    for name, path in paths.items():
        if (
            name not in files
            or len(read_shard(path)) != files[name]["values"]
            or ("_val_" in name and hashlib.sha256(Path(path).read_bytes()).hexdigest() != files[name]["sha256"])
        ):
            wrong.append(f"{name} is another file")
    if manifest["leaked_documents"] > 0.01 * found["documents"]:  # a wrong split; sources hold a few documents twice
        wrong.append(f"{manifest['leaked_documents']} training documents are validation documents")
    if wrong:
        raise DataError(
            f"{hp.data_path} is not what its manifest says: {'; '.join(sorted(wrong)[:5])}. Fetch or make "
            "it again; prepare_caseops_data.py verify says more"
        )


def is_canonical(tokens, charges):
    """Whether (N,) tokens are the contest's validation documents as CaseOps stores them, by counts and by bytes.

    charges: bytes of each token, (N,), or None where they are not at hand.
    """
    documents, values, targets, size = CANONICAL
    counts = (int((tokens == BOS_ID).sum()), len(tokens)) == (documents, values)
    return counts and (charges is None or int(charges[1 : targets + 1].sum(dtype=np.int64)) == size)


def check_validation(hp, tokens, charges, read_shard):
    """Tokens as stored and their bytes (N,) -> a phrase for the log. DataError where the manifest has other ones."""
    documents, size = int((tokens == BOS_ID).sum()), int(charges.sum())
    found = {"documents": documents, "tokens": len(tokens)}
    check_manifest(hp, found | ({"charged_bytes": size} if hp.caseops_enabled else {}), read_shard)
    canonical = "yes" if is_canonical(tokens, charges) else "no"
    return f"documents:{documents} values:{len(charges)} bytes:{size} canonical:{canonical}"


def models_near(folder, nearest):
    """SentencePiece models in and around a dataset's folder, in order of distance; `nearest`: of one place only.

    DataError where that place holds several different ones: nothing says which of them made the shards.
    """
    places = folder, folder.parent / "tokenizers", folder.parent.parent / "tokenizers", ROOT / "tokenizers"
    groups = [sorted(place.glob("*.model")) for place in places]
    if not nearest:
        return sum(groups, [])
    found = next((group for group in groups if group), [])
    if len({path.read_bytes() for path in found}) > 1:
        names = ", ".join(str(path) for path in found)
        raise DataError(f"{folder}: no manifest names its tokenizer, there are several ({names}): set TOKENIZER_PATH")
    return found


def has_case_markers(tokenizer):
    """Whether pieces 4 to 7 are CaseOps' markers, which stand for no text (lossless_caps.py)."""
    return [tokenizer.id_to_piece(token) for token in range(4, 8)] == [*"\ue001\ue002\ue003\ue004"]


def check_byte_counts(hp, tokenizer, tokens):
    """DataError unless tokens (N,), which this tokenizer is to count the bytes of, are of its making.

    Without a side-car the tokenizer decides the BPB. One of equal size counts without an error, so the text of some
    documents is encoded again: only the shards' own tokenizer gives back their tokens.
    """
    if has_case_markers(tokenizer) and ((tokens >= 4) & (tokens < 8)).any():
        raise DataError(f"{hp.data_path}: its tokens hold CaseOps' markers: set CASEOPS_ENABLED=1, with the side-car")
    longest, documents = 512, 256
    starts = np.flatnonzero(tokens == BOS_ID)[:documents] + 1
    ends = np.append(starts[1:] - 1, len(tokens))[: len(starts)]
    same = total = 0
    for start, end in zip(starts, np.minimum(ends, starts + longest), strict=True):
        ids = tokens[start:end].tolist()
        compared = len(ids) if len(ids) < longest else longest - 64  # a cut changes the tokens before it
        same += compared * (tokenizer.encode(tokenizer.decode(ids))[:compared] == ids[:compared])
        total += compared
    if 2 * same < total:  # some texts do not come back from their own tokenizer: unknown characters, odd spaces
        raise DataError(
            f"{hp.data_path}: its tokens were not made by the tokenizer found for them, which gives back {same} of "
            f"{total} when their text is encoded again: set TOKENIZER_PATH to the shards' own"
        )


def find_tokenizer(hp):
    """Path of the data's SentencePiece model. DataError if none fits the settings and the manifest."""
    try:
        import sentencepiece
    except ImportError:
        raise DataError("the sentencepiece package is missing: pip install -r requirements.txt") from None
    folder = Path(hp.data_path)
    wanted = read_manifest(folder).get("tokenizer", {}).get("sha256")
    if hp.tokenizer_path:
        found = [Path(hp.tokenizer_path)]
    else:
        found = models_near(folder, nearest=wanted is None)
    for path in found:
        if not path.exists():
            raise DataError(f"TOKENIZER_PATH={path} does not exist")
        if wanted in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            try:
                tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
                tokenizer.id_to_piece([*range(tokenizer.vocab_size())])  # a damaged piece may be no text
            except (RuntimeError, UnicodeDecodeError):
                raise DataError(f"{path} is no SentencePiece model") from None
            if tokenizer.vocab_size() != hp.vocab_size:
                raise DataError(f"{path} has {tokenizer.vocab_size()} pieces, VOCAB_SIZE is {hp.vocab_size}")
            if hp.marker_fusion_enabled and not has_case_markers(tokenizer):
                raise DataError(f"{path}: pieces 4 to 7 are not CaseOps' markers: set MARKER_FUSION_ENABLED=0")
            return path
    raise DataError(
        f"no tokenizer for {folder} (the manifest wants sha256 {wanted}; looked at "
        f"{[str(p) for p in found]}): set TOKENIZER_PATH"
    )


# ---- machine and code


def check_compressor(name, compressors, brotli):
    """SettingError, with what to install, for an unknown compressor or missing tools; `brotli`: the module or None.

    compressors: {name: (number, codecs)}.
    """
    if name not in compressors:
        raise SettingError(f"COMPRESSOR={name} is unknown: choose one of {', '.join(compressors)}")
    if "brotli" in compressors[name] and brotli is None:
        raise SettingError("the brotli module is missing: pip install brotli, or set COMPRESSOR=lzma")
    if "lrzip" in compressors[name] and shutil.which("lrzip") is None:
        raise SettingError("the lrzip program is missing: apt-get install lrzip, or COMPRESSOR=brotli (needs none)")


def try_compressor(name, compressors, encoders, expand):
    """check_compressor and a round trip of each of its codecs: a program that is there may still lack a library."""
    check_compressor(name, compressors, importlib.util.find_spec("brotli"))
    sample, shapes = b"1234" * 8, [(4, 8)]
    for codec in compressors[name][1:]:
        try:
            fault = expand(codec, encoders[codec](sample, shapes), len(sample), shapes) != sample and "other bytes"
        except (ArtifactError, OSError) as error:
            fault = error
        if fault:
            raise SettingError(f"COMPRESSOR={name} does not work here, {codec}: {fault}")


def check_specs(specs):
    """ValueError for names, dtypes and sizes of arrays (ArraySpec) that no artifact holds: a header may be hostile."""
    for name, dtype, shape in specs:
        sized = all(type(n) is int and n >= 0 for n in shape) and math.prod(max(n, 1) for n in shape) <= MAX_RAW_BYTES
        if type(name) is not str or dtype not in ARRAY_DTYPES or len(shape) > MAX_DIMENSIONS or not sized:
            raise ValueError(f"{name}: an artifact cannot hold {dtype} {shape}")
    if len({spec.name for spec in specs}) != len(specs) or sum(spec.num_bytes for spec in specs) > MAX_RAW_BYTES:
        raise ValueError(f"an array stands twice, or all take more than {MAX_RAW_BYTES} bytes")


def check_quantizable(weights, hessians, role):
    """ValueError for what quantize_weights cannot keep, on every rank alike; role(name) is None for small tensors."""
    for name, w in weights.items():
        if not w.half().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite or beyond fp16")
        if role(name) is None and w.numel() > MAX_FP16_ELEMENTS:
            raise ValueError(f"{name} has {w.numel()} elements and no role in QUANT_TABLE: too large for fp16")
        if role(name) and (name not in hessians or hessians[name].shape != (w.shape[1], w.shape[1])):
            raise ValueError(f"{name} {tuple(w.shape)} needs a Hessian of its columns")


def packed_code(path, hp):
    """The packed, self-extracting form of the script at `path` under these settings, bytes."""
    try:
        from tools.pack_code import pack_code
    except ImportError as error:
        raise SettingError(
            f"the code cannot be packed and counted: {error}. Run train_gpt.py from its repository, after pip install "
            "-r requirements.txt, or copy a run's packed train_gpt.py"
        ) from None
    return pack_code(Path(path).read_text(encoding="utf-8"), {name.upper(): value for name, value in vars(hp).items()})


def git_commit():
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    return (describe_commit() or [None])[0] or None


def describe_commit():
    """Standard output and error of git on this checkout; None without git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    if not shutil.which("git"):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr.strip()


def commit_notes():
    """Notes for the log where git does not say the commit of this checkout: no record can be made of such a run."""
    commit, error = describe_commit() or ("", "git is not installed")
    if commit or not (ROOT / ".git").exists():
        return []
    if "dubious ownership" in error:  # as in a container, where the folder belongs to another user
        return [f"commit unknown, {ROOT} belongs to another user: git config --global --add safe.directory {ROOT}"]
    return [f"commit unknown, no record can be made of this run: {error.splitlines()[0] if error else 'no commit yet'}"]
