#!/bin/sh
# Two "hosts" on one machine, for tests/test_reliability.py: two_hosts.sh FOLDER_A FOLDER_B netns|localhost
# netns: two network name spaces joined by a cable; run as `unshare -rnm sh two_hosts.sh ...`.
set -e
here=$(dirname "$0"); near=$1; far=$2; away=; port=29517; address=127.0.0.1
if [ "$3" = netns ]; then
    mount -t tmpfs none /run && mkdir -p /run/netns
    ip netns add far
    ip link add near type veth peer name farend
    ip link set farend netns far
    ip addr add 10.77.0.1/24 dev near && ip link set near up && ip link set lo up
    ip netns exec far ip addr add 10.77.0.2/24 dev farend
    ip netns exec far ip link set farend up
    ip netns exec far ip link set lo up
    address=10.77.0.1
    away="ip netns exec far env GLOO_SOCKET_IFNAME=farend"
    export GLOO_SOCKET_IFNAME=near
fi
agent() {
    "$PYTHON" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --node_rank="$1" --master_addr=$address \
        --master_port=$port "$here/faults.py"
}
cd "$near"
export RUNS_DIR="$far/runs" DATA_PATH="$far/data"
$away "$PYTHON" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --node_rank=1 --master_addr=$address \
    --master_port=$port "$here/faults.py" &
RUNS_DIR="$near/runs" DATA_PATH="$near/data" agent 0
wait $!
