"""What the ranks run in tests/test_distributed.py: `launch(this file, [name, ...], nproc)`."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings, strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanochat import distributed
from nanochat.checkpoint import load_checkpoint
from nanochat.common import UserError
from nanochat.distributed import (
    FullyShardedMuonAdamW,
    ProcessGroup,
    ShardedMuonAdamW,
    build_sharded_optimizer,
    save_together,
    setup,
    shard_model,
)
from nanochat.model import GPT, MODERN, GPTConfig
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.train import gradient_norm

CONFIG = GPTConfig(vocab_size=53, seq_len=16, n_layer=3, n_head=2, n_kv_head=1, n_embd=20)
MODERN_CONFIG = replace(CONFIG, **MODERN)  # every kind of parameter there is


def global_batch(step, rows=12):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, CONFIG.vocab_size, (rows, 17), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def train(build, world, steps, first=0, model=None, share=True, passes=1, rows=12):
    """Train on each step's global batch, or on this rank's rows of it; returns model, optimizer.

    `build(model)` returns the optimizer, and may cut the model before. A step is `passes` backward
    passes over parts of the rows.
    """
    model = (model or GPT(CONFIG)).to(world.device)
    optimizer = build(model)
    for step in range(first, steps):
        inputs, targets = (x.to(world.device) for x in global_batch(step, rows))
        counted = targets.numel()
        if share:
            inputs, targets = (x[world.rank :: world.world_size] for x in (inputs, targets))
        for part, wanted in zip(inputs.tensor_split(passes), targets.tensor_split(passes)):
            loss = model(part, wanted, reduction="sum") * (world.world_size if share else 1)
            (loss / counted).backward()
        if share:
            world.average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def ways_to_share(world):
    """Return the ways to share out the work, by name: build(model) -> optimizer."""

    def sharded(model):
        return build_sharded_optimizer(model, world)

    def overlapped(model, passes=1):
        optimizer = sharded(model)
        optimizer.overlap(passes)
        return optimizer

    def cut(model, recompute=False):
        shard_model(model, world, recompute)
        return sharded(model)

    return {"plain": build_optimizer, "sharded": sharded, "overlapped": overlapped, "cut": cut}


def whole(param):
    """Return a parameter with all its rows; a collective for one that is cut."""
    return param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()


def assert_close(model, reference, tolerance=2e-4):
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        gap = float((whole(a) - b.detach()).abs().max())
        assert gap < tolerance, (name, gap)


def assert_same_on_all_ranks(model, world):
    for param in map(whole, model.parameters()):
        everyone = [torch.empty_like(param) for _ in range(world.world_size)]
        dist.all_gather(everyone, param.contiguous())
        assert all(torch.equal(param, other) for other in everyone)


def training(world, directory):
    """Every way to share out gives the parameters and the state of one process, after 20 steps."""
    reference, alone = train(build_optimizer, world, 20, share=False)
    expected = alone.named_state(reference) if world.is_main else {}
    for way, build in ways_to_share(world).items():
        model, optimizer = train(build, world, 20)
        assert_close(model, reference)
        assert_same_on_all_ranks(model, world)
        if way == "plain":
            continue
        with torch.no_grad():
            model(*(x.to(world.device) for x in global_batch(0)))  # as an evaluation does
        own, total = count(optimizer), count(alone)
        largest = max(p.numel() for p in reference.parameters())
        assert own <= total / world.world_size + 2 * largest, (way, own, total)
        state = optimizer.named_state(model)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            other = torch.as_tensor(expected[name]).cpu()
            assert value.shape == other.shape and value.dtype == other.dtype
            assert torch.allclose(value.cpu(), other, atol=1e-4, rtol=1e-3), (way, name)


def modern(world, directory):
    """The same with every kind of parameter there is, several passes and recomputed blocks."""
    reference, _ = train(build_optimizer, world, 3, model=GPT(MODERN_CONFIG), share=False)
    ways = ways_to_share(world)
    ways["plain passes"] = ways["plain"]
    ways["overlapped passes"] = lambda model: ways["overlapped"](model, passes=3)
    ways["recomputed passes"] = lambda model: ways["cut"](model, recompute=True)
    if world.device.type == "cuda":
        ways["compiled"] = lambda model: build_sharded_optimizer(model, world, compiled=True)
    for way, build in ways.items():
        passes = 3 if "passes" in way else 1
        model, _ = train(build, world, 3, model=GPT(MODERN_CONFIG), passes=passes)
        assert_close(model, reference, tolerance=5e-3)  # a residual scalar moves by 0.5 a step


class Bag(torch.nn.Module):
    """Parameters of given shapes whose gradients are whatever the forward pass is handed."""

    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(len(shapes))
        draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        self.bag = torch.nn.ParameterList(draws)

    def forward(self, grads):
        return sum((param * grad).sum() for param, grad in zip(self.bag, grads))

    def groups(self, shapes):
        """Matrices by shape to Muon; vectors and matrices of at most three rows to AdamW."""
        adamw = dict(kind="adamw", lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
        muon = dict(kind="muon", lr=0.02, momentum=0.95, beta2=0.9, weight_decay=0.1)
        by_shape, rest = {}, []
        for shape, param in zip(shapes, self.bag):
            to_muon = len(shape) == 2 and shape[0] > 3
            (by_shape.setdefault(shape, []) if to_muon else rest).append(param)
        groups = [dict(muon, params=p, dtype=torch.float64) for p in by_shape.values()]
        return groups + [dict(adamw, params=rest)] * bool(rest)


def global_gradients(shapes, step, parts):
    """The gradients of each of a step's parts, the same whoever computes them."""
    generator = torch.Generator().manual_seed(step)
    return [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for _ in range(parts)
    ]


any_shape = st.tuples(st.integers(1, 9)) | st.tuples(st.integers(1, 9), st.integers(1, 9))
some_shapes = st.lists(any_shape, min_size=1, max_size=4, unique=True).flatmap(
    lambda shapes: st.lists(st.sampled_from(shapes), min_size=1, max_size=8)
)


def any_shapes(world, directory):
    """20 steps with any shapes, passes and buckets give one process's parameters, in float64.

    Hypothesis draws the same examples on every rank; nothing is shrunk, for ranks would part.
    """

    @settings(
        max_examples=15, derandomize=True, database=None, deadline=None, phases=[Phase.generate]
    )
    @given(some_shapes, st.integers(1, 3), st.sampled_from([1, 100, 1 << 20]), st.booleans())
    def check(shapes, passes, limit, cut):
        n_parts = 4 * passes  # of the global batch; 4 divides by every world size here
        alone = Bag(shapes)
        plain = MuonAdamW(alone.groups(shapes))
        world.bucket_bytes, world.reduce_dtype = limit, torch.float64
        model = Bag(shapes)
        if cut:
            fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
        optimizer = (FullyShardedMuonAdamW if cut else ShardedMuonAdamW)(
            model.groups(shapes), world
        )
        optimizer.overlap(n_parts // world.world_size)
        for step in range(20):
            parts = global_gradients(shapes, step, n_parts)
            for grads in parts:
                (alone(grads) / n_parts).backward()
            for grads in parts[world.rank :: world.world_size]:
                (model(grads) * world.world_size / n_parts).backward()
            world.average_gradients(model)
            norms = world.gradient_norm(model), gradient_norm(alone)
            assert torch.allclose(*(norm.double() for norm in norms), rtol=1e-5)
            for each in (plain, optimizer):
                each.step()
                each.zero_grad()
        assert_close(model, alone, tolerance=1e-7)

    check()
    world.bucket_bytes, world.reduce_dtype = 64 << 20, torch.float32


def early(world, directory):
    """Buckets go off inside the backward pass, in one order, also where a rank lacks a gradient."""
    world.bucket_bytes = 1
    model, alone = GPT(CONFIG).to(world.device), GPT(CONFIG).to(world.device)
    plain, optimizer = build_optimizer(alone), build_sharded_optimizer(model, world)
    optimizer.overlap()
    reducer, orders = optimizer.reducer, []
    for step in range(3):
        inputs, targets = (x.to(world.device) for x in global_batch(step))
        alone(inputs, targets).backward()
        inputs, targets = (x[world.rank :: world.world_size] for x in (inputs, targets))
        model(inputs, targets).backward()
        n_early = len(reducer.started)
        assert n_early == (len(reducer.layouts) if step else 0)  # the first step only watches
        if step:
            sent = [p for i in reducer.started for p in reducer.layouts[i].params]
            assert all(param.grad is None for param in sent)  # freed as soon as they are sent
        world.average_gradients(model)
        assert torch.allclose(world.gradient_norm(model), gradient_norm(alone), rtol=1e-4)
        orders.append(list(reducer.started))
        for each in (plain, optimizer):
            each.step()
            each.zero_grad()
    assert_close(model, alone)
    assert all(order == orders[0] for order in world.exchange(orders[0]) + orders)
    # The last rank has no gradient for the head: its hook never fires, and nobody waits for ever.
    frozen = world.rank == world.world_size - 1
    model.head.weight.requires_grad_(not frozen)
    inputs, targets = (x.to(world.device) for x in global_batch(9))
    model(inputs, targets).backward()
    model.head.weight.requires_grad_(True)
    world.average_gradients(model)
    (got,) = reducer.take([model.head.weight]).values()
    mine = optimizer.shares[0][world.rank][0]
    alone(inputs, targets).backward()
    expected = mine.of(alone.head.weight.grad) * (world.world_size - 1) / world.world_size
    assert torch.allclose(got, expected, atol=1e-6)
    optimizer.step()
    world.bucket_bytes = 64 << 20


def checkpoints(world, directory):
    """A run saved after 3 steps by all ranks resumes on all ranks, cut or not, and on one."""
    directory = Path(directory)

    def sharded(model):
        return build_sharded_optimizer(model, world)

    reference, _ = train(build_optimizer, world, 6, share=False)
    model, optimizer = train(sharded, world, 3)
    save_together(world, directory, 3, model, optimizer, {"note": "three"})
    checkpoint = load_checkpoint(directory)
    assert checkpoint.meta["note"] == "three"

    def resumed(build):
        def build_and_load(model):
            optimizer = build(model)
            optimizer.load_named_state(model, checkpoint.optimizer_state)
            return optimizer

        return build_and_load

    ways = ways_to_share(world)
    for way in ("overlapped", "cut"):
        model = load_checkpoint(directory).model
        again, optimizer = train(resumed(ways[way]), world, 6, first=3, model=model)
        assert_close(again, reference)
        folder = directory / way
        save_together(world, folder, 6, again, optimizer, {})
        saved = load_checkpoint(folder)
        assert_close(saved.model, reference)
        assert saved.optimizer_state.keys() == checkpoint.optimizer_state.keys()
    model = load_checkpoint(directory).model
    alone, optimizer = train(resumed(build_optimizer), world, 6, 3, model, share=False)
    assert type(optimizer) is MuonAdamW
    assert_close(alone, reference)


def count(optimizer):
    """Elements of an optimizer's state on this rank."""
    tensors = (v for state in optimizer.state.values() for v in state.values())
    return sum(v.numel() for v in tensors if torch.is_tensor(v))


def verbs(world, directory):
    """The methods of ProcessGroup against their definitions."""
    n = world.world_size
    value = torch.tensor([world.rank + 1, 5])
    total = world.sum(value)
    assert total.tolist() == [n * (n + 1) // 2, 5 * n] and total.dtype == torch.int64
    assert value.tolist() == [world.rank + 1, 5]  # left alone
    assert float(world.sum(torch.tensor(0.5))) == 0.5 * n

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    model.to(world.device)
    for param in model.parameters():
        torch.nn.init.constant_(param, float(world.rank))
    world.broadcast(model)
    assert all((param == 0).all() for param in model.parameters())

    for dtype, limit, tolerance in ((torch.float32, 8, 1e-6), (torch.bfloat16, 1 << 20, 2e-2)):
        group = ProcessGroup(world.device, reduce_dtype=dtype, bucket_bytes=limit)
        for i, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, float(world.rank + i))
        model[0].bias.grad = None if world.rank else torch.ones_like(model[0].bias)
        group.average_gradients(model)
        for i, param in enumerate(model.parameters()):
            expected = 1 / n if i == 1 else (n - 1) / 2 + i
            assert param.grad.dtype == torch.float32
            assert (param.grad - expected).abs().max() <= tolerance * (1 + expected), i


def raises(world, directory):
    """Rank 1 fails; the others wait for it."""
    if world.rank == 1:
        raise ValueError("the row of rank 1 is too short")
    world.barrier()


def killed(world, directory):
    """Rank 1 is killed from outside."""
    if world.rank == 1:
        os.kill(os.getpid(), 9)
    world.barrier()


def killed_once(world, directory):
    """Rank 1 is killed in the first attempt only."""
    if world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    world.barrier()


def mistaken(world, directory):
    """The user gave a batch that does not divide."""
    print("working", flush=True)
    raise UserError("the batch of 7 does not divide by 2 ranks; choose 8.")


def writes_in_pieces(world, directory):
    """Write a line slowly, as a busy machine does."""
    for stream in (sys.stdout, sys.stderr):
        for piece in ("one ", "whole ", f"line of {world.rank}\n"):
            stream.write(piece)
            time.sleep(0.3)  # torchrun looks ten times a second


def sleeps(world, directory):
    """Say the process ids, then stay silent for long."""
    print("pid", os.getpid(), flush=True)
    time.sleep(120)


if __name__ == "__main__":
    name, directory = sys.argv[1], sys.argv[2]
    if name == "no_setup":
        sys.exit("profile 'huge' is unknown; choose smoke or laptop.")
    if name == "odd_code" and os.environ["RANK"] == "1":
        distributed.code_digest = lambda: "0ddc0de"
    world = setup(os.environ.get("WORKERS_DEVICE", "cpu"), timeout=60)
    for one in name.split("+"):
        globals()[one](world, directory)
        print("done", one, world.rank, flush=True)
    world.close()
