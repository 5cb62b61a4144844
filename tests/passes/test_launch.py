"""The launch pass: parameters of a GPU kernel as pipeline text."""

import pytest

from stoicc.ir.errors import PassError
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, scheduled
from tests.ir.modules import make_program

MODULE = Module(make_program((64, 64)))


def launch_of(text: str) -> dict[str, int]:
    return dict(scheduled(Pipeline.parse(text).run(MODULE)).launch)


def test_parameters_are_set_and_kept_apart():
    assert launch_of("launch{block_n=32,num_warps=8}") == {"block_n": 32, "num_warps": 8}
    assert launch_of("launch{block_n=32},launch{num_stages=3}") == {"block_n": 32, "num_stages": 3}


def test_none_leaves_a_parameter_to_the_backend():
    assert launch_of("launch{block_n=none}") == {}
    assert str(Pipeline.parse("launch{num_warps=4}")) == "launch{block_n=none,num_warps=4}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("launch{num_warps=3}", "pass launch, option num_warps: expected none or one of 1, 2, 4, 8, 16, found '3'"),
        ("launch{block_n=wide}", "pass launch, option block_n: expected int or none, found 'wide'"),
    ],
)
def test_a_wrong_parameter_is_named(text, message):
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)
