"""Recipes: dataclasses, plain data and YAML that mean the same, and one sentence where they mean nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc import Recipe, Rule, Step
from stoicc.model.recipe import matches
from stoicc.model.width_rule import Width
from stoicc.ops.lookup import find_operator, operators

TEXT = """
rules:
- layers: ["encoder.*.dense", "re:head[0-9]+"]
  exclude: "*.pooler.*"
  steps:
  - nm_magnitude: {n: 2, m: 4}
  - group_absmax
  compile: {tile: [32, 32], target: cpu}
- layers: "*"
width:
- {producers: "encoder.{}.up", consumers: ["encoder.{}.down"], keep: 0.5, group: 8}
"""

RECIPE = Recipe(
    [
        Rule(
            ["encoder.*.dense", "re:head[0-9]+"],
            [Step("nm_magnitude", {"n": 2, "m": 4}), Step("group_absmax")],
            exclude=["*.pooler.*"],
            compile={"tile": (32, 32), "target": "cpu"},
        ),
        Rule("*"),
    ],
    width=[Width("encoder.{}.up", "encoder.{}.down", 0.5, group=8)],  # type: ignore[arg-type]
)


def test_yaml_is_the_same_as_dataclasses(tmp_path):
    assert Recipe.of(TEXT) == RECIPE
    (tmp_path / "recipe.yaml").write_text(TEXT)
    assert Recipe.of(tmp_path / "recipe.yaml") == RECIPE
    assert Recipe.of(RECIPE.data) == RECIPE
    assert Recipe.of(RECIPE) is RECIPE


def test_a_list_of_steps_is_for_every_layer():
    steps = ["group_absmax", {"nm_magnitude": {"n": 1, "m": 4}}, Step("group_absmax", {"bits": 8})]
    recipe = Recipe.of(steps)
    assert recipe == Recipe([Rule("*", steps)])
    assert recipe.rule_of("anything.at.all") is recipe.rules[0]


numbers = st.integers(2, 8)
step = st.one_of(
    st.just(Step("group_absmax")),
    numbers.map(lambda bits: Step("group_absmax", {"bits": bits, "zero_points": True})),
    numbers.map(lambda n: Step("nm_magnitude", {"n": n, "m": 8})),
)
pattern = st.text("abc.*?[]0", min_size=1)
rule = st.builds(
    Rule,
    st.lists(pattern, min_size=1, max_size=3),
    st.lists(step, max_size=3),
    st.lists(pattern, max_size=2),
    st.fixed_dictionaries({}, optional={"tile": st.just((16, 32)), "formats": st.just(("dense", "nv24"))}),
)


@given(st.builds(Recipe, st.lists(rule, min_size=1, max_size=3), st.booleans()))
def test_the_text_of_a_recipe_reads_back(recipe):
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.of(recipe.data) == recipe


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("a.b.c", ["a.*"], True),
        ("a.b.c", ["*.c", "x"], True),
        ("a.b.c", ["b"], False),
        ("a.b.c", ["a.?.c"], True),
        ("a.b.c", ["a.[xy].c"], False),
        ("a.b.c", [r"re:a\..*"], True),
        ("a.b.c", ["re:a"], False),
        ("a.b.c", [], False),
    ],
)
def test_patterns_match_whole_names(name, patterns, expected):
    assert matches(name, patterns) is expected


def test_operators_are_read_off_their_signatures():
    known = operators()
    assert {"group_absmax", "nm_magnitude"} <= set(known)
    assert not {"stack", "scale", "permute", "low_rank", "collect", "Statistics"} & set(known)
    assert known["group_absmax"].options == ("bits", "group_size", "zero_points", "tile")
    assert known["group_absmax"].statistics == "none"


BROKEN = [
    ("]", "recipe: expected YAML, found .*expected the node content"),
    ("5", "recipe: expected YAML with rules or a list of steps, found 5; give the path of a file as pathlib.Path"),
    ({}, r"recipe: expected a list of rules, found none; write"),
    ({"rules": "all"}, r"recipe: expected a list of rules, found 'all'; write \[...\] around it"),
    ({"rule": []}, "recipe: expected rules, untie, width, found 'rule'; did you mean rules?"),
    ({"rules": [{"steps": []}]}, r"recipe, rule 1, rule: expected layers, found none; write layers: '\*' for all"),
    ({"rules": [{"layers": [], "steps": []}]}, "rule 1, rule: expected at least one pattern in layers, found none"),
    ({"rules": [{"layers": 3}]}, "rule 1, layers: expected patterns on layer names, found 3"),
    ({"rules": [{"layers": "re:("}]}, r"layers: expected a regular expression behind 're:', found 're:\('"),
    ({"rules": [{"layers": "*", "step": []}]}, "rule: expected .*, found 'step'; did you mean steps?"),
    ({"rules": [{"layers": "*", "steps": "absmax"}]}, r"steps: expected a list of operators, found 'absmax'; write \["),
    ({"rules": [{"layers": "*", "compile": {"tiles": 3}}]}, "compile: expected options .*'tiles'; did you mean tile?"),
    ({"rules": ["all"]}, "recipe, rule 1, rule: expected .*, found 'all'"),
    ({"rules": [{"layers": "*"}], "untie": "yes"}, "recipe: expected untie to be true or false, found 'yes'"),
    (["group_absmx"], "step 1, operator: expected one of .*, found 'group_absmx'; did you mean group_absmax?"),
    ([{"group_absmax": {"bit": 4}}], "operator group_absmax: expected options .*'bit'; did you mean bits?"),
    ([{"group_absmax": {"bits": object()}}], "step 1, option: expected numbers, texts, .*, found <object"),
    ([{"a": 1, "b": 2}], "step 1, step: expected one operator, as"),
    ([{"group_absmax": 4}], "step 1, step group_absmax: expected options as {option: value}, found 4"),
    (3, "recipe: expected a Recipe, rules, steps, YAML text or a path, found int"),
]


@pytest.mark.parametrize(("given", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_recipe_is_one_sentence(given, message):
    with pytest.raises(stoicc.InputError, match=message):
        Recipe.of(given)


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(stoicc.InputError, match=r"recipe .*none.yaml: expected a file of YAML, found .*No such file"):
        Recipe.of(tmp_path / "none.yaml")


def test_a_required_option_is_asked_for(monkeypatch):
    def threshold(weight, least):
        return stoicc.ops.CompressedWeight.of(weight)

    monkeypatch.setattr(stoicc.ops, "threshold", threshold, raising=False)
    monkeypatch.setattr(stoicc.ops, "__all__", [*stoicc.ops.__all__, "threshold"])
    operators.cache_clear()
    try:
        assert find_operator("threshold").required == ("least",)
        with pytest.raises(stoicc.InputError, match="operator threshold: expected a value for least, found none"):
            Step("threshold")
    finally:
        operators.cache_clear()
