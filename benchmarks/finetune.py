"""Is it worth keeping the optimizer's memory from stage to stage? Chapter 9's model, both ways.

    python benchmarks/finetune.py --seeds 0 1 2

Base, mid and SFT as in chapter 9 at a few hundred steps; "fresh" builds a new optimizer for each
stage, "warm" goes on with the state of the one before. Shown is the mean loss on held-out replies
(nats per trained token) after mid and after SFT, and the share of held-out sums solved.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanochat.engine import Engine
from nanochat.finetune import ConversationBatches, held_out_loss
from nanochat.model import GPT, GPTConfig
from nanochat.optim import build_optimizer
from nanochat.report import markdown_table
from nanochat.tasks import TinyWorldTask, evaluate_chat, tinyworld_mixture
from nanochat.tinyworld import World, document
from nanochat.tokenizer import Tokenizer
from nanochat.train import fit

SEQ_LEN, ROWS, STEPS = 192, 8, dict(base=40, mid=160, sft=50)
SHARES = {"arithmetic": 45, "spelling": 20, "identity": 10, "multiple_choice": 15, "fact": 10}


class DocumentBatches:
    """Documents of the tiny world end to end."""

    def __init__(self, world: World, tokenizer: Tokenizer):
        self.world, self.tokenizer, self.number, self.ids = world, tokenizer, 0, []

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, each (ROWS, SEQ_LEN)."""
        need = ROWS * SEQ_LEN + 1
        while len(self.ids) < need:
            self.ids += self.tokenizer.encode(document(self.world, self.number), bos=True)
            self.number += 1
        row, self.ids = torch.tensor(self.ids[:need]), self.ids[need - 1 :]
        return row[:-1].view(ROWS, -1), row[1:].view(ROWS, -1)


def train(seed: int, warm: bool, world: World, tokenizer: Tokenizer) -> tuple[float, float, float]:
    """Return (held-out loss after mid, after SFT, share of sums solved) of one run."""
    held_out = tinyworld_mixture(world, "mid", 400, 9, SHARES, offset=40_000_000)
    kept = ConversationBatches(held_out, tokenizer, 16, SEQ_LEN, "assistant")
    fixed, losses, state = [kept.next() for _ in range(4)], [], {}
    model = GPT(GPTConfig(tokenizer.vocab_size, SEQ_LEN, 2, 2, 2, 128), seed=seed)
    for name, batches in stages_of(world, tokenizer, seed):
        optimizer = build_optimizer(model)
        optimizer.load_named_state(model, state if warm else {})
        for group in optimizer.param_groups:
            group["initial_lr"] *= 0.5 if name == "sft" else 1.0
        fit(model, optimizer, batches, STEPS[name], label=name)
        state = optimizer.named_state(model)
        losses.append(held_out_loss(model, fixed))
    sums = TinyWorldTask(world, "arithmetic", "test", size=60)
    solved = evaluate_chat(Engine(model, tokenizer), tokenizer, sums, max_tokens=40)["accuracy"]
    return losses[1], losses[2], solved


def stages_of(world: World, tokenizer: Tokenizer, seed: int):
    """Yield (name, batches) of base, mid and SFT."""
    yield "base", DocumentBatches(world, tokenizer)
    for stage, train_on in (("mid", "all"), ("sft", "assistant")):
        mixture = tinyworld_mixture(world, stage, 20_000, seed, SHARES)
        yield (
            stage,
            ConversationBatches(mixture, tokenizer, ROWS, SEQ_LEN, train_on, seed=seed),
        )


def main() -> None:
    """Train every seed both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    world = World(0)
    tokenizer = Tokenizer.train((document(world, i) for i in range(1500)), vocab_size=512)
    rows = [["seed", "optimizer", "loss after mid", "loss after SFT", "sums solved"]]
    for seed in args.seeds:
        for name in ("fresh", "warm"):
            found = train(seed, name == "warm", world, tokenizer)
            rows.append([str(seed), name, *(f"{value:.3f}" for value in found)])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
