"""Small trainers, and workers on several ranks."""

import os
import socket
from types import SimpleNamespace

import torch
from conftest import Lines, tiny_hp

import train_gpt
from train_gpt import TokenStream

OPS = train_gpt.Ops(
    train_gpt.attention_sdpa,
    train_gpt.mlp_ref,
    train_gpt.linear_cross_entropy_ref,
    names={"attention": "sdpa"},
)

# trains in milliseconds; at the default of ema_span, the average of so few steps is the last weights
SMALL = {
    "num_layers": 4,
    "loop_start": 1,
    "loop_end": 2,
    "parallel_start_layer": 3,
    "ema_span": 0.5,
}


def rank_of(rank=0, world_size=1):
    """What the loader needs of a Dist."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))


def loader_of(folder, dist=None, **changes):
    return train_gpt.TrainLoader(
        TokenStream(folder, "train"), tiny_hp(**changes), dist or rank_of()
    )


def trainer_of(folder, dist=None, log=None, **changes):
    """A Trainer of a small model; every log line is appended to `log`."""
    hp, dist = tiny_hp(data_path=str(folder), **SMALL | changes), dist or train_gpt.Dist("cpu")
    loader = train_gpt.TrainLoader(TokenStream(folder, "train"), hp, dist)
    return train_gpt.Trainer(
        train_gpt.GPT(hp, OPS, torch.float32), loader, hp, dist, Lines() if log is None else log
    )


def quiet():
    raise AssertionError("nothing asked for an evaluation")


def everything(trainer):
    """Every tensor that training changes, in one dictionary."""
    state = dict(trainer.model.named_parameters())
    state |= {f"ema{i}": t for i, t in enumerate(trainer.ema.average)}
    state |= {f"momentum{i}": t for i, t in enumerate(trainer.optimizers.muon.momentum_buffers)}
    for number, values in trainer.optimizers.adamw.state_dict()["state"].items():
        state |= {f"adamw{number}/{key}": torch.as_tensor(value) for key, value in values.items()}
    return {name: t.detach().clone() for name, t in state.items()}


def equal_states(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) for name, t in one.items()
    )


def run_on_ranks(worker, world_size, folder, *arguments):
    """worker(dist, *arguments) in `world_size` gloo processes -> their results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        _rank, (worker, world_size, port, str(folder), arguments), nprocs=world_size
    )
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank, worker, world_size, port, folder, arguments):

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    dist = train_gpt.Dist("cpu")
    torch.save(worker(dist, *arguments), f"{folder}/rank{rank}.pt")
    dist.close()
