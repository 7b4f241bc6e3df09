#!/usr/bin/env bash
# Several seeds: start them, watch them, sum them up. tools/launch.py does the work and explains everything (--help).
#
#   SEEDS="42 0 1234" GPUS="0 1 2" DATA_PATH=data/mine ./run_3seeds.sh   # a process per GPU, side by side
#   SEEDS="42 0 1234" NPROC=8 DATA_PATH=data/mine ./run_3seeds.sh        # on eight GPUs, one seed after another
#   ./run_3seeds.sh status | attach | stop | wait | summary              # of the newest set, or of the set named after
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")  # also where a symbolic link to this file is called
python=${VENV:-$here/.venv}/bin/python
if [[ ! -x $python ]]; then
    if [[ -n ${VENV:-} ]]; then
        echo "run_3seeds.sh: VENV=$VENV has no bin/python" >&2
        exit 2
    fi
    python=python3  # the environment that is active
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "run_3seeds.sh: $python is no Python of version 3.11 or later: VENV=... names another environment" >&2
    exit 2
fi
unset VENV
exec "$python" "$here/tools/launch.py" "$@"
