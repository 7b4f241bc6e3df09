"""What other scripts set in the environment: settings of published systems, launchers of clusters.

Used by tools/guard.py, for what a refusal says and for the head of the log.
"""

from .run_files import published_settings

# Settings of published scripts that do not exist here -> what replaces them
TABLE = """
ADAM_EPS nothing: it is 1e-8
ALIAS_PREV_SMEAR_SCALE nothing
ASYM_LOGIT_RESCALE nothing
CKPT_PATH CHECKPOINT_PATH
COMPUTE_DTYPE nothing: it is bfloat16 on CUDA, float32 on the CPU
EVAL_ONLY TTT_EVAL_ONLY
EVAL_ONLY_PATH QUANT_ONLY and CHECKPOINT_PATH
DATASETS_DIR DATA_PATH
DOC_SHUFFLE nothing
DOC_SHUFFLE_ENABLED nothing
E2E_TTT_ENABLED TTT_METHOD=sgd
FULL_GPTQ_DAMP GPTQ_DAMP
FUSED_CE_ENABLED KERNELS
FUSED_MLP_ENABLED KERNELS
GATE_WINDOW nothing: it is 12
GATED_ATTN_QUANT_GATE nothing: it is 1
GLOBAL_TTT_GRAD_CLIP nothing: it is 1
GLOBAL_TTT_MOMENTUM nothing: it is 0.9
GPTQ_ALL_REDUCE nothing: it is 1
GPTQ_BLOCK_SIZE nothing: it is 128
HEAD_LR TIED_EMBED_LR
HEAD_PAIR_NS MUON_HEAD_PAIRS
HESSIAN_CLIP_LAMBDA nothing
IHA_ENABLED nothing
IHA_MIX_V nothing
LATE_QAT_THRESHOLD QAT_BELOW_LR
LOAD_MODEL_PATH QUANT_ONLY and CHECKPOINT_PATH
LQER_WEIGHTED nothing
MAX_ROW_SEGMENTS nothing: it is automatic
MTP_ENABLED nothing
MTP_LOSS_WEIGHT nothing
MTP_NUM_HEADS nothing
MTP_STEPS nothing
MTP_WEIGHT nothing
MUON_BACKEND_STEPS nothing: it is 5
MUON_DTYPE nothing: it is the model's
MUON_ROW_NORMALIZE nothing: it is 1
NEGATIVE_SLOPE LEAKY_RELU_SLOPE
PAIRED_HEAD_MUON_ENABLED MUON_HEAD_PAIRS
PRUNE_PCT TARGET_BYTES
QUANTIZED_MODEL_PATH TTT_EVAL_ONLY and ARTIFACT_PATH
QUANTIZE_ONLY QUANT_ONLY
RECUR_ALPHA nothing
SKIP_POST_TRAIN_EVAL PREQUANT_ONLY
SPINQUANT_ENABLED nothing
TARGET_MB TARGET_BYTES
TIED_EMBED_INIT_STD nothing: it is 0.005
TOKEN_BOOST NGRAM_TILT_ENABLED
TOKEN_ORDER NGRAM_TILT_ENABLED
TOKEN_THRESHOLD NGRAM_TILT_ENABLED
TRAIN_SEQ_SCHEDULE FULL_SEQ_LEN_AT
VAL_BATCH_SIZE MICRO_BATCH_TOKENS
VAL_BATCH_TOKENS MICRO_BATCH_TOKENS
VAL_DOC_FRACTION TTT_MAX_DOCS
VE_DIM VALUE_EMBED_DIM
VE_ENABLED VALUE_EMBED_LAYERS
VE_LAYERS VALUE_EMBED_LAYERS
"""
INSTEAD = dict(line.split(maxsplit=1) for line in TABLE.strip().splitlines())
# Settings of published scripts that cannot change a result, and names that other programs use, too:
# a note in the log instead of an error.
IDLE = """ARTIFACT_DIR COMPILE_SHAPE_WARMUP DATA_DIR DYNAMO_CACHE_SIZE_LIMIT GPUS_OVERRIDE
    MODEL_PATH OUT_PTZ SEEDS_OVERRIDE SKIP_INITIAL_VAL""".split()
# set by a cluster's launcher to the number of processes that it starts
LAUNCHERS = "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"


def instead_of(name):
    """Words on what to do about this setting of other scripts; none if it is not known."""
    if name == "CASEOPS_ENABLED":
        return (
            "; for plain data (0) run presets/published.py, which takes it, in place of"
            " train_gpt.py; for CaseOps data (1) unset it"
        )
    if name in published_settings():
        return "; run presets/published.py, which takes it, in place of train_gpt.py, or unset it"
    if name in INSTEAD:
        return f"; here it is {INSTEAD[name]} (unset it, or see --help)"
    return ""


def environment_notes(environ):
    """Notes for the log: settings that have no effect here, and processes that torchrun did not
    start: they know nothing of each other.
    """
    notes = []
    found = [name for name in IDLE if name in environ]
    if found:
        notes.append(f"{', '.join(found)}: settings of other scripts, no effect here")
    for name in LAUNCHERS:
        if environ.get(name, "1") != "1" and "RANK" not in environ:
            notes.append(
                f"{name}={environ[name]}, but RANK is not set: this is a run of one process"
            )
    return notes
