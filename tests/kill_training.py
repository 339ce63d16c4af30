"""Kill a small training run 20 times and compare it with one that was left alone (see
test_checkpoint.py). Prints one JSON object. Children are forked, so that each starts at once."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from nanochat import checkpoint
from nanochat.common import MetricsLog, read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.train import SingleProcess, fit

STEPS, SAVE_EVERY = 180, 3
SIZES = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


class Batches:
    """Rows that follow from a position, which is all the state there is."""

    def __init__(self):
        self.position = 0

    def next(self):
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        ids = torch.randint(0, 61, (2, 17), generator=generator)
        return ids[:, :-1], ids[:, 1:]


def train(folder):
    """Train to the end, from the newest checkpoint if there is one."""
    torch.set_num_threads(1)
    write = checkpoint.save_file

    def slow(tensors, path):  # so that many a kill hits a save
        write(tensors, path)
        time.sleep(0.01)

    checkpoint.save_file = slow
    batches, start = Batches(), checkpoint.latest_step(folder) or 0
    model = GPT(SIZES)
    optimizer = build_optimizer(model)
    if start:
        found = checkpoint.load_checkpoint(folder)
        model, batches.position = found.model, found.meta["data"]
        optimizer = build_optimizer(model)
        optimizer.load_named_state(model, found.optimizer_state)

    def save(step):
        state = optimizer.named_state(model)
        checkpoint.save_checkpoint(folder, step, model, state, {"data": batches.position})

    world, log = SingleProcess(model.device), MetricsLog(folder / "metrics.jsonl")
    world.is_main = False  # no progress line
    options = dict(log=log, save=save, save_every=SAVE_EVERY, start_step=start, world=world)
    fit(model, optimizer, batches, STEPS, **options)
    save(STEPS)


def fork(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def main(place):
    straight, killed = place / "straight", place / "killed"
    build_optimizer(GPT(SIZES))  # imports what every child would import for itself
    assert os.waitpid(fork(straight), 0)[1] == 0
    kills = inside = lost = 0
    chance = random.Random(0)
    while checkpoint.latest_step(killed) != STEPS:
        child = fork(killed)
        before = checkpoint.latest_step(killed) or 0
        while kills < 20 and (checkpoint.latest_step(killed) or 0) == before:
            time.sleep(0.01)  # it must get somewhere, or twenty kills never end
        if kills < 20:
            if chance.random() < 0.5:  # aim at a save, however slow the machine is
                while not any(killed.glob(".step_*.tmp")):
                    if checkpoint.latest_step(killed) == STEPS:
                        break
                    time.sleep(0.001)
            else:
                time.sleep(chance.random() * 0.05)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            inside += any(killed.glob(".step_*.tmp"))
            done = max(e["step"] for e in read_metrics(killed / "metrics.jsonl", "step")) + 1
            lost = max(lost, done - checkpoint.latest_step(killed))
        else:
            assert status == 0, status
    pair = [checkpoint.load_checkpoint(folder) for folder in (straight, killed)]
    weights = zip(*(found.model.state_dict().values() for found in pair))
    states = [found.optimizer_state for found in pair]
    equal = all(torch.equal(a, b) for a, b in weights)
    equal &= all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    result = dict(kills=kills, inside_a_save=inside, lost_steps=lost, equal=equal)
    print(json.dumps({**result, "save_every": SAVE_EVERY}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
