"""Small models and validation sets, and ranks that are threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from conftest import PATIENCE, Lines, tiny_hp, write_documents

import train_gpt
from train_gpt import BOS_ID, Dist

SMALL = {
    "num_layers": 3,
    "loop_start": 1,
    "loop_end": 1,
    "num_loops": 1,
    "parallel_start_layer": 2,
}

# tokens after BOS; two lone BOS, one-token documents, tails
LENGTHS = [90, 33, 1, 8, 0, 64, 7, 0, 31, 32, 17, 100, 1]


def small_hp(**changes):
    """A model of three layers, one of them looped; keyword arguments override."""
    return tiny_hp(**(SMALL | changes))


def make_model(hp, seed=0):
    """A model whose every part matters: the projections that start at zero are random, gates
    are off their middle.
    """
    ops = train_gpt.select_ops(hp, torch.device("cpu"), torch.float32)
    model = train_gpt.GPT(hp, ops, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p += noise * (p.size(-1) ** -0.5 if "bank" in name else 0.3)
    return model


def make_validation(folder, hp, lengths=LENGTHS, **kwargs):
    """ValidationSet of new documents in `folder`; the side-car's target_bytes are random, 0 at every
    BOS.
    """
    write_documents(folder, "val", lengths, **kwargs)
    return train_gpt.ValidationSet(hp)


class ThreadRank:
    """Stands for Dist on one of several ranks that run as threads of this process and add up in
    rank order.
    """

    device = torch.device("cpu")

    def __init__(self, rank, world_size, barrier, box):
        self.rank, self.world_size, self.meet, self.box = rank, world_size, barrier, box

    def all_reduce(self, tensor, op="sum"):
        assert op == "sum"
        self.box[self.rank] = tensor.detach().clone()
        self.meet.wait(PATIENCE)
        total = torch.stack(self.box).sum(0)
        self.meet.wait(PATIENCE)
        tensor.copy_(total)
        return tensor

    def all_reduce_packed(self, tensors):
        for tensor in tensors:
            self.all_reduce(tensor)

    def all_gather_object(self, value):
        self.box[self.rank] = value
        self.meet.wait(PATIENCE)
        values = list(self.box)
        self.meet.wait(PATIENCE)
        return values


def on_ranks(world_size, work):
    """[work(dist) of every rank], run side by side."""
    if world_size == 1:
        return [work(Dist("cpu"))]
    barrier, box = threading.Barrier(world_size), [None] * world_size

    def one(rank):
        try:
            return work(ThreadRank(rank, world_size, barrier, box))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def piece_losses(model, tokens):
    """(n + 1,) tokens -> (n,) nats of a plain forward of this piece alone."""
    tokens = torch.as_tensor(np.asarray(tokens))
    with torch.no_grad():
        hidden = model.forward_hidden(tokens[None, :-1], max_seqlen=len(tokens), looping=True)
        return model.token_losses(hidden[0], tokens[1:]).double()


def document_spans(tokens):
    """First input and last target of each document, found token by token."""
    starts = [i for i, token in enumerate(tokens) if token == BOS_ID]
    return list(zip(starts, [*starts[1:], len(tokens) - 1], strict=True))


# rates that matter
ACTIVE = {"ttt_lora_lr": 0.02, "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 64}


def run_ttt(hp, validation, world_size=1, log=None):
    """Test-time training from make_model's weights on every rank -> [score of each rank],
    [model of each rank].
    """
    models = [make_model(hp) for _ in range(world_size)]

    def work(dist):
        return train_gpt.TestTimeTrainer(
            models[dist.rank], validation, hp, dist, Lines() if log is None else log
        ).evaluate()

    return on_ranks(world_size, work), models
