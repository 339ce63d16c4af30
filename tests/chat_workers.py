"""What the ranks run in test_finetune.py and test_rl.py: `launch(this file, [folder], nproc)`.

Each rank fine-tunes a small model on its share, then lets it learn by reinforcement; rank 0 writes
what came out. With one process the same code gives what the others are compared with."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanochat.common import MetricsLog
from nanochat.distributed import build_sharded_optimizer, setup
from nanochat.engine import Engine
from nanochat.finetune import ConversationBatches, held_out_loss
from nanochat.model import GPT, GPTConfig
from nanochat.rl import evaluate_pass, task_problems, train_rl
from nanochat.tasks import Mixture, TinyWorldTask
from nanochat.tinyworld import World
from nanochat.tokenizer import Tokenizer
from nanochat.train import fit


def first_digit(parts, problem):
    """A reward that an untrained model earns at times."""
    return float(any(c.isdigit() for part in parts for c in part["text"][:4]))


def work(folder: Path, world) -> None:
    """Fine-tune, then reinforce; write model.safetensors and history.json."""
    sums = TinyWorldTask(World(), "arithmetic", size=400)
    tokenizer = Tokenizer.train(["What is 12 plus 30? Tom has 7 apples. ####"], vocab_size=280)
    model = GPT(GPTConfig(tokenizer.vocab_size, 192, 1, 2, 2, 32)).to(world.device).double()
    model.compute_dtype = world.reduce_dtype = torch.float64  # or rounding could change a token
    save(folder / "start.safetensors", model, world)
    mixture, place = Mixture([(sums, 1)]), (world.rank, world.world_size)
    batches = ConversationBatches(
        mixture, tokenizer, 4 // world.world_size, 192, "assistant", *place
    )
    fixed = [batches.next() for _ in range(2)]
    history = [held_out_loss(model, fixed, world)]
    log = MetricsLog(None)
    optimizer = build_sharded_optimizer(model, world)
    options = dict(world=world, log=log)
    history.append(fit(model, optimizer, batches, 8, accumulation=2, **options)["loss"])
    history.append(held_out_loss(model, fixed, world))
    save(folder / "tuned.safetensors", model, world)
    engine, problems = Engine(model, tokenizer), task_problems(sums, 12)
    rl = train_rl(
        model, build_sharded_optimizer(model, world), engine, problems, n_steps=4,
        questions_per_step=4, samples=4, max_tokens=6, lr=0.3, reward=first_digit, drift_every=2,
        **options,
    )  # fmt: skip
    passed = evaluate_pass(engine, problems[:5], samples=3, max_tokens=6, world=world)
    save(folder / "model.safetensors", model, world)
    if world.is_main:
        result = dict(history=history, rl=rl, passed=passed)
        (folder / "history.json").write_text(json.dumps(result))


def save(path: Path, model: GPT, world) -> None:
    """Let rank 0 write the weights."""
    if world.is_main:
        save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, path)


if __name__ == "__main__":
    world = setup("cpu", timeout=300)
    work(Path(sys.argv[1]), world)
    world.close()
