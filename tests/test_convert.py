"""nanochat.convert: there and back, against transformers' own class and nanochat's own layout."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from test_model import FULL, SMALL, random_model

from nanochat import convert
from nanochat.common import UserError
from nanochat.convert import from_nanochat, from_transformers, to_transformers
from nanochat.model import GPT, GPTConfig

IDX = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChat class")
    return transformers


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_transformers_loads_what_we_export_and_gives_the_same_logits(tmp_path, theirs, n_kv_head):
    ours = random_model(replace(SMALL, n_kv_head=n_kv_head))
    to_transformers(ours, tmp_path)
    loaded = theirs.NanoChatForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX), loaded(IDX).logits.float(), atol=2e-4, rtol=1e-3)


def test_we_load_what_transformers_saves(tmp_path, theirs):
    torch.manual_seed(0)
    config = theirs.NanoChatConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1.2e-7,
    )
    model = theirs.NanoChatForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDX), model(IDX).logits.float(), atol=2e-4, rtol=1e-3)


def test_there_and_back_is_exact(tmp_path):
    ours = random_model(SMALL)
    again = from_transformers(to_transformers(ours, tmp_path / "new" / "folder"))
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    with torch.no_grad():
        assert torch.equal(ours(IDX), again(IDX))


def with_facts(folder, **changed):
    """The model of a folder's config.json with other settings; `...` takes one out."""
    to_transformers(random_model(SMALL), folder)
    facts = json.loads((folder / "config.json").read_text()) | changed
    facts = {key: value for key, value in facts.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(facts))


def logits_of_both(theirs, folder):
    loaded = theirs.NanoChatForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return from_transformers(folder)(IDX), loaded(IDX).logits.float()


@pytest.mark.parametrize(
    "changed",
    [
        {"final_logit_softcapping": 3.0},
        {"final_logit_softcapping": ...},
        {"hidden_act": ...},
        {"rms_norm_eps": ...},
        {"rope_parameters": None},
        {"rope_parameters": ...},
        {"rope_parameters": {}},
        {"rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 500.0},
    ],
    ids=str,
)
def test_settings_that_are_missing_or_null_mean_what_they_mean_there(tmp_path, theirs, changed):
    with_facts(tmp_path, **changed)
    torch.testing.assert_close(*logits_of_both(theirs, tmp_path), atol=2e-4, rtol=1e-3)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"final_logit_softcapping": None}, "final_logit_softcapping None, .* a positive number"),
        ({"rope_parameters": {**YARN, "rope_type": "linear"}}, "rope_type 'linear', .* 'default'"),
        ({"rope_parameters": YARN}, "rope_type 'yarn'"),
        ({"rope_parameters": ..., "rope_scaling": {**YARN, "rope_type": "linear"}}, "'linear'"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', .* only have 'relu2'"),
        ({"rms_norm_eps": 0.01}, "rms_norm_eps 0.01, .* 1e-06 or less"),
    ],
    ids=str,
)
def test_settings_that_our_model_has_not_are_refused(tmp_path, theirs, changed, message, request):
    with_facts(tmp_path, **changed)
    with pytest.raises(UserError, match=message) as caught:
        from_transformers(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch = request.getfixturevalue("monkeypatch")  # and rightly so: the logits differ
    monkeypatch.setattr(convert, "check_settings", lambda facts, directory: None)
    monkeypatch.setattr(convert, "float", lambda cap: float(cap or 15.0), raising=False)
    ours, others = logits_of_both(theirs, tmp_path)
    assert (ours - others).abs().max() > 0.01


@pytest.mark.parametrize(
    "changed",
    [
        {"final_logit_softcapping": "much"},
        {"final_logit_softcapping": 0},
        {"final_logit_softcapping": math.inf},
        {"final_logit_softcapping": math.nan},
        {"rms_norm_eps": None},
        {"rope_parameters": ["yarn"]},
        {"rope_parameters": {"rope_theta": None}},
        {"vocab_size": None},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_one_sentence(tmp_path, changed):
    with_facts(tmp_path, **changed)
    with pytest.raises(UserError):
        from_transformers(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "null", '"nanochat of another kind"', "[" * 3 + "]" * 3])
def test_a_config_that_is_no_table_is_one_sentence(tmp_path, text):
    with_facts(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="model, not 'nanochat'"):
        from_transformers(tmp_path)


def test_a_modern_model_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="only the classic model, and this one has .*smear"):
        to_transformers(GPT(FULL), tmp_path)
    assert not list(tmp_path.iterdir())


def nanochat_names(name):
    """Our name of a tensor in nanochat's spelling, written here a second time."""
    for ours, other in (
        ("embedding.", "transformer.wte."),
        ("head.", "lm_head."),
        ("blocks.", "transformer.h."),
        (".attention.gate.", ".attn.ve_gate."),
        (".attention.", ".attn.c_"),
        (".mlp.up.", ".mlp.c_fc."),
        (".mlp.down.", ".mlp.c_proj."),
        ("additions.values.", "value_embeds."),
        ("additions.stream_scale", "resid_lambdas"),
        ("additions.start_scale", "x0_lambdas"),
        ("additions.smear_gate", "smear_gate"),
        ("additions.smear_scale", "smear_lambda"),
        ("additions.backout_scale", "backout_lambda"),
    ):
        name = name.replace(ours, other)
    return name


def write_nanochat(folder, model, step, prefix=""):
    """A checkpoint in nanochat's layout: tables in bfloat16, names of a compiled model."""
    state = {}
    for name, tensor in model.state_dict().items():
        table = "embedding" in name or "values" in name
        kept = tensor.bfloat16() if table else tensor
        state[prefix + nanochat_names(name)] = kept
    torch.save(state, folder / f"model_{step:06d}.pt")
    c = model.config
    sizes = dict(sequence_len=c.seq_len, vocab_size=c.vocab_size, n_layer=c.n_layer)
    sizes.update(n_head=c.n_head, n_kv_head=c.n_kv_head, n_embd=c.n_embd)
    if c.smear:
        sizes["window_pattern"] = c.windows
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": sizes}))


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["classic", "modern"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanochat_is_read(tmp_path, config, prefix):
    model = random_model(config)
    with torch.no_grad():  # what bfloat16 can hold
        for name, param in model.named_parameters():
            if "embedding" in name or "values" in name:
                param.copy_(param.bfloat16())
    write_nanochat(tmp_path, GPT(config), 10)
    write_nanochat(tmp_path, model, 21400, prefix)
    ours = from_nanochat(tmp_path)
    assert ours.config == config
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    with torch.no_grad():
        assert torch.equal(ours(IDX), model(IDX))
        assert not torch.equal(from_nanochat(tmp_path, 10)(IDX), model(IDX))


class Burglar:
    def __reduce__(self):
        return os.mkdir, ("burgled",)


def test_a_pickle_that_calls_a_function_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nanochat(tmp_path, GPT(SMALL), 1)
    torch.save({"transformer.wte.weight": Burglar()}, tmp_path / "model_000001.pt")
    with pytest.raises(UserError, match="holds more than tensors and is not opened"):
        from_nanochat(tmp_path)
    assert not (tmp_path / "burgled").exists()


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no model_000000.pt in .*steps there: \\[\\]"):
        from_nanochat(tmp_path)
    write_nanochat(tmp_path, GPT(SMALL), 1)
    with pytest.raises(UserError, match="no model_000007.pt in .*steps there: \\[1\\]"):
        from_nanochat(tmp_path, 7)
    (tmp_path / "model_000001.pt").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="model_000001.pt"):
        from_nanochat(tmp_path)
    between = GPTConfig(97, 32, 2, 4, 2, 32, residual_scalars=True)
    write_nanochat(tmp_path, GPT(between), 2)
    with pytest.raises(UserError, match="between the two recipes"):
        from_nanochat(tmp_path)
    to_transformers(GPT(SMALL), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds a 'llama' model, not 'nanochat'"):
        from_transformers(tmp_path)
    to_transformers(GPT(SMALL), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read as a NanoChat model"):
        from_transformers(tmp_path)
