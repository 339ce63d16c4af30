"""benchmarks/ablation.py: its variants and its table."""

import importlib.util
from pathlib import Path

import pytest

from nanochat.model import MODERN, GPTConfig


@pytest.fixture(scope="module")
def ablation():
    folder = Path(__file__).parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location("ablation", folder / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return module


def test_every_addition_is_put_in_alone_and_left_out_alone(ablation):
    variants = ablation.variants()
    build = lambda fields: GPTConfig.for_depth(2, 100, 64, **fields)  # noqa: E731
    assert build(variants["classic"][0]) == GPTConfig.classic(2, 100, 64)
    assert build(variants["modern"][0]) == GPTConfig.modern(2, 100, 64)
    for name in MODERN:
        alone, reference = variants[f"classic + {name}"]
        assert reference == "classic" and build(alone).additions() == [name]
        without, reference = variants[f"modern - {name}"]
        assert reference == "modern"
        assert build(without).additions() == [other for other in MODERN if other != name]
    assert len(variants) == 2 + 2 * len(MODERN)


def test_padding_a_vocabulary_that_needs_none_is_no_variant(ablation):
    padding = ["classic + vocab_multiple", "modern - vocab_multiple"]
    for vocab_size, expected in ((8192, padding), (8190, [])):
        names = [name for name in ablation.variants() if ablation.same_model(name, vocab_size)]
        assert names == expected


def test_a_gain_is_the_mean_of_pairs_with_its_standard_error(ablation):
    def results(*scores):
        facts = dict(tokens_per_second=10.0, params=2_000_000, flops_per_token=1)
        return [dict(bits_per_byte=score, **facts) for score in scores]

    found = {"classic": results(1.0, 2.0, 3.0), "modern": results(0.9, 1.8, 2.7)}
    head, classic, modern = ablation.table(found)
    assert classic == ["classic", "2.0000 +- 0.5774", "-", "2.00 M", "10"]
    assert modern[2] == "+0.2000 +- 0.0577"  # 0.1, 0.2, 0.3: far smaller than the spread of either
    assert ablation.table({"modern": results(0.9)})[1][1:3] == ["0.9000", "-"]
