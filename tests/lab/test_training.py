"""What training runs are set to: every size of a preset arrives, and what an expert has of its own goes before it."""

from dataclasses import asdict, fields

import pytest

from rlmerge.lab.optimizer import Rate
from rlmerge.lab.presets import SMALL, TINY
from rlmerge.lab.rlvr import Rlvr
from rlmerge.lab.supervised import Rft, Sft
from rlmerge.lab.training import rft_settings, rlvr_settings, sft_settings


@pytest.mark.parametrize("preset", [TINY, SMALL], ids=lambda one: one.name)
def test_sizes_are_the_presets(preset):
    rate = Rate(preset.lr, 5)
    assert rlvr_settings(preset, "math:0", 3) == Rlvr(
        "math:0", 3, preset.steps, preset.prompts, preset.group, rate, preset.max_new_tokens
    )
    assert sft_settings(preset, "math:0", 3) == Sft("math:0", 3, preset.steps, preset.batch, rate)
    assert rft_settings(preset, "math:0", 3) == Rft(
        "math:0", 3, preset.steps, preset.batch, rate, max_new_tokens=preset.max_new_tokens
    )


@pytest.mark.parametrize("make", [rlvr_settings, sft_settings, rft_settings], ids=lambda one: one.__name__)
def test_what_is_its_own_goes_before(make):
    plain, own = make(TINY, "code:0", 1), make(TINY, "code:0", 1, 5e-6, steps=7)
    assert (own.steps, own.rate) == (7, Rate(5e-6, 5))
    assert {one.name for one in fields(plain) if asdict(plain)[one.name] != asdict(own)[one.name]} == {"steps", "rate"}


def test_a_field_that_is_none_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        rlvr_settings(TINY, "code:0", 1, temprature=0.7)
