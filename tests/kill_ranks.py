"""Kill ranks and nodes of small training jobs and compare them with one that was left alone (see
test_elastic.py). Prints one JSON object.

The launcher is torchrun's, through its Python interface, which can fork ranks: a restart costs no
imports, so ten of them take seconds.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nanochat import checkpoint
from nanochat.common import MetricsLog, read_metrics
from nanochat.distributed import build_sharded_optimizer, save_together, setup
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.train import fit

STEPS, SAVE_EVERY, KILLS = 120, 3, 10
HOLD = STEPS - 4
SIZES = GPTConfig(vocab_size=61, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


class Batches:
    """This rank's rows of global batches of 12 that follow from a position, all the state there is.

    12 divides by 1, 2 and 3 ranks. Before the last steps it waits for the file `enough`, so that
    no run is over before all its ranks have been killed.
    """

    def __init__(self, world, position, folder):
        self.world, self.position, self.enough = world, position, folder / "enough"

    def next(self):
        while self.position == HOLD and not self.enough.exists():
            time.sleep(0.01)
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        ids = torch.randint(0, 61, (12, 17), generator=generator)
        mine = ids[self.world.rank :: self.world.world_size]
        time.sleep(0.01)  # a step takes long enough to be hit
        return mine[:, :-1], mine[:, 1:]


def train(folder):
    """What each rank runs: train to the end, from the newest checkpoint if there is one."""
    torch.set_num_threads(1)
    folder, world = Path(folder), setup("cpu", timeout=60)
    (folder / f"rank_{world.rank}_of_{world.world_size}").write_text(str(os.getpid()))
    start = checkpoint.latest_step(folder) or 0
    found = checkpoint.load_checkpoint(folder) if start else None
    model = found.model if start else GPT(SIZES)
    optimizer = build_sharded_optimizer(model, world)
    if start:
        optimizer.load_named_state(model, found.optimizer_state)
    optimizer.overlap()

    def save(step):
        save_together(world, folder, step, model, optimizer, {"world_size": world.world_size})

    log = MetricsLog(folder / "metrics.jsonl" if world.is_main else None)
    options = dict(log=log, save=save, save_every=SAVE_EVERY, start_step=start, world=world)
    fit(model, optimizer, Batches(world, start, folder), STEPS, **options)
    save(STEPS)
    world.close()


def start_agent(folder, port, nproc, nodes=(1, 1), is_host=True):
    """Fork torchrun's agent of one node, with a process group of its own; returns its pid."""
    agent = os.fork()
    if agent:
        return agent
    code = 1
    try:
        os.setpgid(0, 0)
        logs = folder / f"logs_{os.getpid()}"
        config = LaunchConfig(
            *nodes,
            nproc,
            run_id="kill",
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs=dict(
                is_host=is_host,
                last_call_timeout=2,
                keep_alive_interval=1,
                keep_alive_max_attempt=3,
            ),
            max_restarts=3 * KILLS,
            monitor_interval=0.05,
            start_method="fork",
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        )
        elastic_launch(config, train)(str(folder))
        code = 0
    finally:
        os._exit(code)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition, agent):
    """Wait until condition() is true; the agent must not end before."""
    while not condition():
        assert os.waitpid(agent, os.WNOHANG) == (0, 0), "the job ended too soon; see its logs"
        time.sleep(0.005)


def finish(agent):
    assert os.waitpid(agent, 0)[1] == 0, "the job failed; see its logs"


def steps_of(folder):
    """The steps in a job's log, in the order in which they were done."""
    return [event["step"] for event in read_metrics(folder / "metrics.jsonl", "step")]


def curve(folder):
    """The loss of each step; of a step that was done twice, the last."""
    events = read_metrics(folder / "metrics.jsonl", "step")
    return [loss for _, loss in sorted({e["step"]: e["loss"] for e in events}.items())]


def lost_steps(folder):
    """How many steps had to be done again after each restart."""
    steps = steps_of(folder)
    return [a + 1 - b for a, b in zip(steps, steps[1:]) if b <= a]


def wait_for_steps(folder, n, agent):
    """Wait until n more steps are done and one more checkpoint is there, or until the job waits."""
    saved, done = checkpoint.latest_step(folder) or 0, len(steps_of(folder))

    def holds():
        return steps_of(folder)[-1:] == [HOLD - 1]

    wait_for(lambda: holds() or (checkpoint.latest_step(folder) or 0) > saved, agent)
    wait_for(lambda: holds() or len(steps_of(folder)) >= done + n, agent)


def pids_of(folder, world_size):
    files = [folder / f"rank_{rank}_of_{world_size}" for rank in range(world_size)]
    return [int(file.read_text() or 0) for file in files if file.exists()]


def kill_ranks(folder):
    """Two ranks; KILLS times one of them is killed at a random moment."""
    agent, chance, gone = start_agent(folder, free_port(), 2), random.Random(0), {0}
    for _ in range(KILLS):
        wait_for_steps(folder, chance.randrange(1, 8), agent)
        wait_for(lambda: len(set(pids_of(folder, 2)) - gone) == 2, agent)  # both started again
        time.sleep(chance.random() * 0.03)
        pids = pids_of(folder, 2)
        os.kill(chance.choice(pids), signal.SIGKILL)
        gone.update(pids)
    (folder / "enough").touch()
    finish(agent)


def change_ranks(folder):
    """Two ranks until they die with their agent, then three from the checkpoint."""
    agent = start_agent(folder, free_port(), 2)
    wait_for_steps(folder, 20, agent)
    os.killpg(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    (folder / "enough").touch()
    finish(start_agent(folder, free_port(), 3))


def lose_a_node(folder):
    """Two agents with one rank each; one dies with its rank, the other goes on alone."""
    port = free_port()
    first = start_agent(folder, port, 1, nodes=(1, 2))
    second = start_agent(folder, port, 1, nodes=(1, 2), is_host=False)
    wait_for(lambda: (folder / "rank_1_of_2").exists(), first)
    wait_for_steps(folder, 20, first)
    os.killpg(second, signal.SIGKILL)
    os.waitpid(second, 0)
    (folder / "enough").touch()
    finish(first)


def main(place):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    os.environ.update(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # a fresh store after each restart
    torch.set_num_threads(1)
    build_optimizer(GPT(SIZES))  # imports what every rank would import for itself
    jobs = {"killed": kill_ranks, "changed": change_ranks, "nodes": lose_a_node}
    for name in ("straight", *jobs):
        (place / name).mkdir(parents=True)
    (place / "straight" / "enough").touch()
    finish(start_agent(place / "straight", free_port(), 2))
    straight = curve(place / "straight")
    expected = checkpoint.load_checkpoint(place / "straight")
    results = {}
    for name, job in jobs.items():
        folder = place / name
        job(folder)
        found, losses = checkpoint.load_checkpoint(folder), curve(folder)
        pairs = zip(found.model.parameters(), expected.model.parameters())
        results[name] = dict(
            finished=found.meta["step"] == STEPS and len(losses) == STEPS,
            ranks_at_the_end=found.meta["world_size"],
            lost_steps=lost_steps(folder),
            loss_gap=max(abs(a - b) for a, b in zip(losses, straight)),
            weight_gap=max(float((a - b).detach().abs().max()) for a, b in pairs),
        )
    attempts = list((place / "killed").glob("logs_*/*/attempt_*"))
    print(json.dumps({**results, "restarts": len(attempts) - 1, "save_every": SAVE_EVERY}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
