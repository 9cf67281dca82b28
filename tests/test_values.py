"""Laws of values: JSON loses nothing, an override changes one path, nothing else is looked up."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.values import diff, fingerprint, flatten, from_json, override, to_json

PACKAGES = (__name__,)


@dataclasses.dataclass(frozen=True)
class Gqa:
    heads: int = 4
    qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Mla:
    rank: int = 8


@dataclasses.dataclass(frozen=True)
class Nothing:
    pass


def named(x: float) -> float:
    return x + 1


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    steps: int = 100
    decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear", 2, None] = "cosine"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is below 1; use at least 1")


type Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    name: str = "run"
    seed: int | None = 0
    mixer: Gqa | Mla = Gqa()
    optim: Optim = Optim()
    sources: tuple[tuple[str, float], ...] = (("web", 0.5), ("code", 0.25))
    stages: tuple[Optim, ...] = (Optim(), Optim(decay=0.5))
    axes: Names = ()
    act: Callable | None = named
    note: str | float | None = None
    low: int = 1
    high: int = 2
    anything: Any = 1
    seen: int = dataclasses.field(init=False, default=3)

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")


floats = st.floats(allow_nan=False)
optims = st.builds(
    Optim,
    lr=floats,
    steps=st.integers(1),
    decay=st.none() | floats,
    betas=st.tuples(floats, floats),
    schedule=st.sampled_from(["cosine", "linear", 2, None]),
)
runs = st.builds(
    Run,
    name=st.text(),
    seed=st.none() | st.integers(),
    mixer=st.builds(Gqa, st.integers(), st.booleans()) | st.builds(Mla, st.integers()),
    optim=optims,
    sources=st.lists(st.tuples(st.text(), floats), max_size=3).map(tuple),
    stages=st.lists(optims, max_size=2).map(tuple),
    axes=st.lists(st.text(), max_size=2).map(tuple),
    act=st.sampled_from([named, None, Optim]),
    note=st.none() | st.text() | floats,
    anything=st.sampled_from([(), Nothing(), ((), (1,)), math.inf, -math.inf, True, "x"]),
)


@given(runs)
def test_json_and_back_is_the_same_value_in_strict_json(run):
    text = json.dumps(to_json(run), allow_nan=False)
    back = from_json(json.loads(text), packages=PACKAGES)
    assert back == run
    assert diff(back, run) == []
    assert fingerprint(back) == fingerprint(run)


def test_nan_and_minus_zero_survive_json():
    back = from_json(json.loads(json.dumps(to_json((math.nan, -0.0, 1.0, 1, True)))))
    assert repr(back) == "(nan, -0.0, 1.0, 1, True)"


@given(runs, st.data())
def test_an_override_changes_exactly_the_path_it_names(run, data):
    leaves = flatten(run)
    path, leaf = data.draw(st.sampled_from(sorted(leaves.items(), key=lambda item: item[0])))
    if path.endswith(("act", "anything", "low", "high")):
        path, leaf = "optim.lr", run.optim.lr
    choices = ["1", "2.5", "true", "none", "linear", "('a', 0.5)", "()"]
    text = data.draw(st.sampled_from(choices))
    try:
        changed = override(run, f"{path}={text}")
    except ValueError as error:
        assert f"{path}={text}" in str(error)
        return
    after = flatten(changed)
    moved = [found for found, _, _ in diff(run, changed)]
    assert moved in ([], [path]) or all(found.startswith(path + ".") for found in moved)
    untouched = {k: v for k, v in leaves.items() if not k.startswith(path)}
    assert {k: v for k, v in after.items() if not k.startswith(path)} == untouched
    assert leaf == leaves[path], "the value given was changed in place"


@given(runs)
def test_every_number_and_text_written_back_as_an_override_changes_nothing(run):
    for path, leaf in flatten(run).items():
        if isinstance(leaf, int | float | str) and not path.startswith("anything"):
            assert override(run, f"{path}={leaf!r}") == run


@pytest.mark.parametrize(
    "assignment, path, expected",
    [
        ("optim.lr=2e-4", "optim.lr", 2e-4),
        ("optim.lr=3", "optim.lr", 3.0),
        ("optim.lr=inf", "optim.lr", math.inf),
        ("optim.steps=1e6", "optim.steps", 1_000_000),
        ("optim.steps=1_000", "optim.steps", 1000),
        ("stages.1.decay=none", "stages.1.decay", None),
        ("optim.decay=0.1", "optim.decay", 0.1),
        ("optim.betas.1=0.99", "optim.betas.1", 0.99),
        ("optim.schedule=linear", "optim.schedule", "linear"),
        ("optim.schedule=2", "optim.schedule", 2),
        ("optim.schedule=None", "optim.schedule", None),
        ("mixer.qk_norm=True", "mixer.qk_norm", True),
        ("seed=null", "seed", None),
        ("name=a=b c", "name", "a=b c"),
        ("name='none'", "name", "none"),
        ("sources.0.1=0.75", "sources.0.1", 0.75),
        ("stages.1.steps=7", "stages.1.steps", 7),
        ("note=1.5", "note", 1.5),
        ("note=word", "note", "word"),
        ("anything=4", "anything", 4),
    ],
)
def test_a_text_becomes_what_the_annotation_says(assignment, path, expected):
    changed = override(Run(), assignment)
    found = flatten(changed)[path]
    assert (found, type(found)) == (expected, type(expected))
    assert [where for where, _, _ in diff(Run(), changed)] == [path]


@pytest.mark.parametrize("text", ["(1, 0.5)", "1,0.5", "[1.0, 0.5]"])
def test_a_whole_tuple_is_set_at_once_and_its_parts_are_typed(text):
    assert repr(override(Run(), f"optim.betas={text}").optim.betas) == "(1.0, 0.5)"
    changed = override(Run(), ["sources=(('web', 1),)", "axes=('data', 'fsdp')"])
    assert changed.sources == (("web", 1.0),)
    assert changed.axes == ("data", "fsdp")


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("optim.lrr=1", r"there is no optim\.lrr; did you mean optim\.lr.*optim has lr, steps"),
        ("lr=1", r"there is no lr; did you mean .*optim\.lr.*Run has name, seed"),
        ("rank=1", r"there is no rank;.* Run has name"),
        ("mixer.rank=3", r"mixer has heads, qk_norm"),
        ("stages.2.lr=1", r"there is no stages\.2\.lr; .*stages has 0, 1"),
        ("stages.-1.lr=1", r"there is no stages\.-1\.lr"),
        ("optim.lr.x=1", r"optim\.lr is 0\.001, without parts; edit the Python file"),
        ("seen=4", r"there is no seen"),
        ("mixer=Mla(rank=3)", r"mixer is Gqa or Mla, now Gqa\(.*edit the Python file"),
        ("optim=Optim()", r"its parts can be set; for another value edit the Python file"),
        (
            "act=named",
            r"act is .*Callable or None, now <function named at \w+>; for another value edit",
        ),
        ("optim.steps=1.5", r"optim\.steps is int, now 100, and '1\.5' is not"),
        ("optim.steps=inf", r"optim\.steps is int"),
        ("optim.steps=true", r"optim\.steps is int"),
        ("optim.steps=none", r"optim\.steps is int"),
        ("optim.lr=fast", r"optim\.lr is float, now 0\.001, and 'fast' is not"),
        ("mixer.qk_norm=1", r"mixer\.qk_norm is bool, now False, and '1' is not"),
        ("optim.schedule=cosin", r"Literal\['cosine', 'linear', 2, None\].*'cosin' is not"),
        ("optim.betas=(1,2,3)", r"optim\.betas is tuple\[float, float\], now \(0\.9, 0\.95\)"),
        ("optim.betas=0.9", r"optim\.betas is tuple"),
        ("sources=(web, 1)", r"sources is tuple"),
        ("optim.lr", r"'optim\.lr' is not path=value"),
        ("=3", r"is not path=value"),
        ("optim.steps=0", r"optim\.steps=0: steps 0 is below 1; use at least 1"),
    ],
)
def test_a_wrong_override_says_what_there_is_and_what_to_do(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(Run(), assignment)


def test_overrides_given_together_are_checked_together():
    assert override(Run(), ["low=5", "high=6"]) == override(Run(), ["high=6", "low=5"])
    with pytest.raises(ValueError, match=r"low=5: low 5 is not below high 2"):
        override(Run(), "low=5")
    with pytest.raises(ValueError, match=r"low=7, high=6: low 7 is not below high 6"):
        override(Run(), ["low=7", "high=6"])


def test_of_two_overrides_of_one_path_the_last_one_counts_and_parts_come_after_the_whole():
    changed = override(
        Run(), ["optim.lr=1", "optim.betas.0=0.5", "optim.lr=2", "optim.betas=(1,1)"]
    )
    assert (changed.optim.lr, changed.optim.betas) == (2.0, (0.5, 1.0))
    assert override(Run(), []) == Run()


def test_diff_names_the_outermost_part_that_differs():
    a, b = Run(), Run(mixer=Mla(), sources=(("web", 0.5),), optim=Optim(lr=1), seed=True)
    assert diff(a, b) == [
        ("seed", 0, True),
        ("mixer", Gqa(), Mla()),
        ("optim.lr", 1e-3, 1),
        ("sources", a.sources, b.sources),
    ]
    assert diff((1, 1.0, math.nan, 0.0), (1, 1, math.nan, -0.0)) == [
        ("1", 1.0, 1),
        ("3", 0.0, -0.0),
    ]


def test_flatten_has_every_leaf_once():
    assert flatten(((), Nothing(), Optim(betas=(1.0, 2.0)))) == {
        "0": (),
        "1": Nothing(),
        "2.lr": 1e-3,
        "2.steps": 100,
        "2.decay": None,
        "2.betas.0": 1.0,
        "2.betas.1": 2.0,
        "2.schedule": "cosine",
    }


@pytest.mark.parametrize("part", [[1], {"a": 1}, {1}, b"x", 1j, lambda x: x, print])
def test_what_json_cannot_hold_is_named_by_its_path(part):
    with pytest.raises(ValueError, match=r"value\.anything\.1 is "):
        to_json(Run(anything=(0, part)))


def test_parts_that_the_program_itself_defines_have_no_name_to_look_up(monkeypatch):
    monkeypatch.setattr(Run, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"value\.0 is Run of the program itself"):
        to_json((Run(),))


@pytest.mark.parametrize(
    "obj, message",
    [
        ({"name": "os:system"}, "os:system is not in glm45_jax or experiments"),
        ({"name": "glm45_jax_evil:f"}, "is not in glm45_jax or experiments"),
        ({"name": "builtins:eval"}, "nothing else is looked up"),
        ({"name": "glm45_jax.values:importlib.import_module"}, "is not defined there"),
        ({"name": "glm45_jax.values:json"}, "is not defined there"),
        ({"name": "glm45_jax.values:PACKAGES"}, "is not defined there"),
        ({"name": "glm45_jax.values:gone"}, "glm45_jax.values:gone is gone"),
        ({"name": "glm45_jax.no_such_room:f"}, "is gone"),
        ({"dataclass": "glm45_jax.values:flatten", "fields": {}}, "is not a dataclass"),
        ({"py/object": "os.system"}, "is not what to_json writes"),
    ],
)
def test_names_outside_of_our_packages_are_never_looked_up(obj, message):
    with pytest.raises(ValueError, match=message):
        from_json(obj)


def test_names_inside_of_our_packages_are_found():
    assert from_json(to_json((flatten, diff))) == (flatten, diff)


def test_a_value_of_another_version_gets_defaults_or_is_refused_by_name():
    obj = to_json(Optim(lr=5.0))
    del obj["fields"]["betas"]
    assert from_json(obj, packages=PACKAGES) == Optim(lr=5.0)
    obj["fields"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r":Optim has no momentum, only betas, decay, lr"):
        from_json(obj, packages=PACKAGES)
    refused = to_json(Optim()) | {"fields": {"steps": 0}}
    with pytest.raises(ValueError, match=r":Optim does not take .*steps 0 is below 1"):
        from_json(refused, packages=PACKAGES)


def test_the_fingerprint_tells_values_apart_and_is_the_hash_of_canonical_json():
    assert fingerprint(Optim()) != fingerprint(Optim(steps=101))
    assert fingerprint((1,)) != fingerprint((1.0,)) != fingerprint((True,))
    canonical = b'[1,"a",null,[2.5,{"float":"inf"}],true]'
    found = fingerprint((1, "a", None, (2.5, math.inf), True))
    assert found == hashlib.sha256(canonical).hexdigest()
