"""Weights from and to Hugging Face transformers and nanochat.

Exported from chapters/05_pretraining.py (chapter 05, Pretraining); edit there, not here.
"""

import math
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import UserError, read_json, write_json
from nanochat.model import GPT, MODERN, GPTConfig

__all__ = [
    "BROKEN",
    "NAMES",
    "NANOCHAT",
    "OURS",
    "STEP",
    "TRANSFORMERS",
    "check_settings",
    "filled",
    "from_nanochat",
    "from_transformers",
    "read_rope",
    "renamed",
    "to_transformers",
]


# The same tensor in our model, in nanochat's checkpoints, in Hugging Face's NanoChat class.
OURS, NANOCHAT, TRANSFORMERS = 0, 1, 2
NAMES = (
    ("embedding.weight", "transformer.wte.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight", "lm_head.weight"),
    *(
        (
            f"blocks.#.attention.{ours}.weight",
            f"transformer.h.#.attn.c_{ours}.weight",
            f"model.layers.#.self_attn.{'o' if ours == 'proj' else ours}_proj.weight",
        )
        for ours in ("q", "k", "v", "proj")
    ),
    ("blocks.#.mlp.up.weight", "transformer.h.#.mlp.c_fc.weight", "model.layers.#.mlp.fc1.weight"),
    (
        "blocks.#.mlp.down.weight",
        "transformer.h.#.mlp.c_proj.weight",
        "model.layers.#.mlp.fc2.weight",
    ),
    ("blocks.#.attention.gate.weight", "transformer.h.#.attn.ve_gate.weight", ""),
    ("additions.values.#.weight", "value_embeds.#.weight", ""),
    ("additions.stream_scale", "resid_lambdas", ""),
    ("additions.start_scale", "x0_lambdas", ""),
    ("additions.smear_gate.weight", "smear_gate.weight", ""),
    ("additions.smear_scale", "smear_lambda", ""),
    ("additions.backout_scale", "backout_lambda", ""),
)


def renamed(state: dict[str, Tensor], source: int, target: int) -> dict[str, Tensor]:
    """Return the tensors under the target's names. UserError for a name with no counterpart."""
    table = {row[source]: row[target] for row in NAMES if row[source]}
    result, unknown = {}, []
    for name, tensor in state.items():
        layer = re.search(r"\.(\d+)\.", name)
        general = name.replace(layer[0], ".#.", 1) if layer else name
        if table.get(general):
            new = table[general]
            result[new.replace("#", layer[1]) if layer else new] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors have no counterpart, the first is {unknown[0]}; "
            f"this is another architecture, and leaving them out would break the model."
        )
    return result


def to_transformers(model: GPT, directory: str | Path) -> Path:
    """Write config.json and model.safetensors that Hugging Face's NanoChatForCausalLM loads.

    The weights are float32, under the names of transformers 5. Raises UserError for a model with
    additions: that class is the classic model.
    """
    config, directory = model.config, Path(directory)
    used = [name for name in config.additions() if name != "rope_base"]
    if used:
        raise UserError(
            f"transformers has only the classic model, and this one has {', '.join(used)}; "
            f"train one with GPTConfig.classic to export it."
        )
    weights = {name: t.detach().float().cpu() for name, t in model.state_dict().items()}
    weights = renamed(weights, OURS, TRANSFORMERS)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": model.softcap,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    write_json(directory / "config.json", facts)
    return directory


def filled(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """Build a model of float32 weights from a complete state."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.restore_angles()
    return model


BROKEN = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError)


def read_rope(facts: dict) -> tuple[str, float]:
    """Return type and base of the rotary angles; transformers 4 wrote them elsewhere than 5."""
    rope = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind, rope.get("rope_theta", facts.get("rope_theta", 10000.0))


def check_settings(facts: dict, directory: Path) -> None:
    """Raise UserError when a config asks for something that our classic model does not compute."""
    kind, act = read_rope(facts)[0], facts.get("hidden_act", "relu2")
    eps, cap = facts.get("rms_norm_eps", 1e-6), facts.get("final_logit_softcapping", 15.0)
    for name, value, fits, ours in (
        ("rope_type", kind, kind == "default", "'default'"),
        ("hidden_act", act, act == "relu2", "'relu2'"),
        ("rms_norm_eps", eps, 0 <= eps <= 1e-6, "1e-06 or less"),
        ("final_logit_softcapping", cap, cap and 0 < cap < math.inf, "a positive number"),
    ):
        if not fits:
            raise UserError(
                f"{directory} has {name} {value!r}, and our model can only have {ours}: its logits "
                "would be wrong; use this model with transformers."
            )


def from_transformers(directory: str | Path) -> GPT:
    """Read a folder that holds a NanoChat model of Hugging Face transformers.

    Raises UserError for another kind of model, for settings that ours has not, and for a broken
    file.
    """
    directory = Path(directory)
    facts = read_json(directory / "config.json")
    found = facts.get("model_type") if isinstance(facts, dict) else facts
    if found != "nanochat":
        raise UserError(f"{directory} holds a {str(found)[:40]!r} model, not 'nanochat'.")
    try:
        check_settings(facts, directory)
        config = GPTConfig(
            vocab_size=facts["vocab_size"],
            seq_len=facts["max_position_embeddings"],
            n_layer=facts["num_hidden_layers"],
            n_head=facts["num_attention_heads"],
            n_kv_head=facts["num_key_value_heads"],
            n_embd=facts["hidden_size"],
            rope_base=read_rope(facts)[1],
        )
        state = {}
        for file in sorted(directory.glob("*.safetensors")):
            state.update(load_file(file))
        state = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
        model = filled(config, renamed(state, TRANSFORMERS, OURS))
        model.softcap = float(facts.get("final_logit_softcapping", 15.0))
        return model
    except BROKEN as error:
        raise UserError(f"{directory} cannot be read as a NanoChat model ({error}).") from error


STEP = re.compile(r"model_(\d{6})\.pt$")


def from_nanochat(directory: str | Path, step: int | None = None) -> GPT:
    """Read a checkpoint of nanochat itself: model_NNNNNN.pt with meta_NNNNNN.json.

    Takes the newest step unless one is named. The first recipe's model and that of 2026 are told
    apart by their tensors. Raises UserError when there is none, when the file holds more than
    tensors, and for models in between, whose rotary base is not written down.
    """
    directory = Path(directory)
    steps = sorted(int(m[1]) for f in directory.glob("model_*.pt") if (m := STEP.match(f.name)))
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise UserError(f"no model_{step or 0:06d}.pt in {directory} (steps there: {steps}).")
    meta = read_json(directory / f"meta_{step:06d}.json")
    path = directory / f"model_{step:06d}.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        sizes = dict(meta["model_config"])
        windows = sizes.pop("window_pattern", "L")
        sizes["seq_len"] = sizes.pop("sequence_len")
        additions = {**MODERN, "windows": windows} if "smear_lambda" in state else {}
        if not additions and "resid_lambdas" in state:
            raise UserError(f"{path} is of a version between the two recipes; it is not supported.")
        return filled(GPTConfig(**sizes, **additions), renamed(state, NANOCHAT, OURS))
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors and is not opened.") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a nanochat checkpoint ({error}).") from error
