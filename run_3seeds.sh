#!/usr/bin/env bash
# Runs of several seeds, one after another, then a table of their scores with mean and standard deviation.
#
#   ./run_3seeds.sh                                       # seeds 42, 0, 1234 on all GPUs of this host (none: the CPU)
#   SEEDS="1 2" NPROC=8 DATA_PATH=data/mine ./run_3seeds.sh
#
# SEEDS, NPROC (processes; one runs without torchrun), SCRIPT, PYTHON and RUN_ID (a prefix: each seed's run adds its
# own ending) are this launcher's; every other setting goes to train_gpt.py as it is. A run that fails ends the
# launcher with that run's exit code (1 for any failure under torchrun).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=${SCRIPT:-$here/train_gpt.py}
python=${PYTHON:-$here/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
read -ra seeds <<<"${SEEDS:-42 0 1234}"
prefix=${RUN_ID:-seeds-$(date +%Y%m%d-%H%M%S)}
runs_dir=${RUNS_DIR:-runs}
export -n SEEDS NPROC SCRIPT PYTHON 2>/dev/null || true  # train_gpt.py would take SEEDS for a misspelt SEED

if [[ -n ${NPROC:-} ]]; then
    nproc=$NPROC
else  # torch counts the devices, so that CUDA_VISIBLE_DEVICES holds
    nproc=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)' 2>/dev/null) || nproc=1
fi
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
    echo "run_3seeds.sh: NPROC=$nproc: must be a number of processes, 1 or more" >&2
    exit 2
fi
if [[ ${#seeds[@]} -eq 0 || $(printf '%s\n' "${seeds[@]}" | sort -u | wc -l) -ne ${#seeds[@]} ]]; then
    echo "run_3seeds.sh: SEEDS='${SEEDS:-}': must name one seed at least, and none twice" >&2
    exit 2
fi

launch=("$python")
if ((nproc > 1)); then
    launch+=(-m torch.distributed.run --standalone --nproc_per_node="$nproc")
fi

folders=()
for seed in "${seeds[@]}"; do
    folder=$runs_dir/$prefix-seed$seed
    echo "run_3seeds.sh: seed $seed on $nproc process(es), folder $folder"
    status=0
    SEED=$seed RUN_ID=$prefix-seed$seed "${launch[@]}" "$script" || status=$?
    if ((status != 0)); then
        echo "run_3seeds.sh: seed $seed ended with exit code $status; no further seed was started" >&2
        exit "$status"
    fi
    folders+=("$folder")
done

"$python" - "${folders[@]}" <<'PY'
import json
import statistics
import sys
from pathlib import Path

results = [json.loads((Path(folder) / "result.json").read_text()) for folder in sys.argv[1:]]
stages = list(results[0]["scores"])
columns = {stage: [result["scores"][stage]["bpb"] for result in results] for stage in stages}
print("\nBPB    " + "".join(f"{stage:>12}" for stage in stages) + f"{'bytes':>14}  violations")
for number, result in enumerate(results):
    figures = "".join(f"{columns[stage][number]:12.5f}" for stage in stages)
    print(f"{result['seed']:<7}{figures}{result['total_bytes']:14,}  {len(result['violations'])}")
print("mean   " + "".join(f"{statistics.mean(columns[stage]):12.5f}" for stage in stages))
if len(results) > 1:
    print("std    " + "".join(f"{statistics.stdev(columns[stage]):12.5f}" for stage in stages) + "  (sample, n - 1)")
PY
