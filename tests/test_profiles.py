"""Profiles: what is refused, by name and with the nearest valid one, and what values become."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog import profiles
from lablog.profiles import Parameter, ProfileError, declared_parameters, load

NOTEBOOK = """\
# %% tags=["parameters"]
{}

# %%
print(1)
"""
ALPHA = """\
model: str = "offline:smoke"  # which
k: int = 64  # how many
rate: float = 0.5  # how fast
grid: list[float] = [0.0, 1.0]  # where
seeds: list[int] = [1, 2]  # whose
quick: bool = True  # whether"""
BETA = """\
k: int = 3  # how many
budget: float = 1.0  # how much"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with two notebooks and a profile."""
    monkeypatch.setattr(profiles, "repository", lambda: tmp_path)
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for name, parameters in (("01_alpha", ALPHA), ("02_beta", BETA)):
        (tmp_path / "notebooks" / f"{name}.py").write_text(NOTEBOOK.format(parameters))
    (tmp_path / "notebooks" / "helper.py").write_text("# no notebook\n")
    profile(tmp_path, "smoke", "# nothing\n")
    profile(tmp_path, "laptop", "all:\n  k: 5\n02_beta:\n  k: 6\n")
    return tmp_path


def profile(root: Path, name: str, text: str) -> str:
    path = root / "notebooks" / "profiles" / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def refused(source: str, *overrides: str) -> str:
    with pytest.raises(ProfileError) as caught:
        load(source, overrides)
    return str(caught.value)


# --- resolution -----------------------------------------------------------------------------------


def test_an_empty_profile_has_the_values_of_the_parameters_cells():
    made = load("smoke")
    assert made.name == "smoke"
    assert made.parameters == {
        "01_alpha": {"model": "offline:smoke", "k": 64, "rate": 0.5, "grid": [0.0, 1.0],
                     "seeds": [1, 2], "quick": True},
        "02_beta": {"k": 3, "budget": 1.0},
    }


def test_a_section_of_a_notebook_wins_over_all():
    made = load("laptop").parameters
    assert (made["01_alpha"]["k"], made["02_beta"]["k"]) == (5, 6)


def test_extends_takes_the_rest_from_the_base(root: Path):
    profile(root, "middle", "extends: laptop\n02_beta:\n  budget: 2\n")
    made = load(profile(root, "own", "extends: middle\n01_alpha:\n  rate: 0.25\n"))
    assert made.name == "own"
    assert made.parameters["01_alpha"] == load("laptop").parameters["01_alpha"] | {"rate": 0.25}
    assert made.parameters["02_beta"] == {"k": 6, "budget": 2.0}


def test_a_profile_can_lie_anywhere(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("elsewhere") / "own.yaml"
    path.write_text("extends: laptop\nall:\n  budget: 3.5\n")
    assert load(str(path)).parameters["02_beta"] == {"k": 6, "budget": 3.5}


@pytest.mark.parametrize("chain", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_cycle_of_extends_is_refused(root: Path, chain: tuple[str, ...]):
    for name, base in zip(chain, (*chain[1:], chain[0]), strict=True):
        profile(root, name, f"extends: {base}\n")
    assert "a.yaml extends itself" in refused("a")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "text", "expected"), [
    ("lptop", None, "there is no profile 'lptop'; did you mean 'laptop'?"),
    ("own", "extends: smoky\n", "there is no profile 'smoky'; did you mean 'smoke'?"),
    ("nowhere/own.yaml", None, "there is no profile 'nowhere/own.yaml'"),
    ("own", "01_alhpa:\n  k: 1\n", "unknown key '01_alhpa'; did you mean '01_alpha'?"),
    ("own", "al:\n  k: 1\n", "unknown key 'al'; did you mean 'all'?"),
    ("own", "extend: laptop\n", "unknown key 'extend'; did you mean 'extends'?"),
    ("own", "zzzzz:\n  k: 1\n", "unknown key 'zzzzz'; valid are: "),
    ("own", "1:\n  k: 1\n", "unknown key 1; valid are: "),
    ("own", "01_alpha:\n  raet: 1.0\n", "'raet' of 01_alpha; did you mean 'rate'?"),
    ("own", "all:\n  budgett: 1.0\n", "unknown parameter 'budgett'; did you mean 'budget'?"),
    ("own", "02_beta:\n  rate: 1.0\n", "'rate' of 02_beta; valid are: k, budget"),
    ("own", "all:\n  7: 1.0\n", "unknown parameter 7; valid are: "),
])
def test_unknown_names_are_refused_with_the_nearest_valid_one(
    root: Path, source: str, text: str | None, expected: str
):
    if text is not None:
        profile(root, source, text)
    assert expected in refused(source)


def test_an_unknown_notebook_is_refused_with_the_nearest_one():
    with pytest.raises(ProfileError, match=r"no notebook '01_alfa'; did you mean '01_alpha'\?"):
        profiles.notebook_path("01_alfa")
    assert profiles.notebooks() == ["01_alpha", "02_beta"]


@pytest.mark.parametrize(("text", "expected"), [
    ("all: [\n", "is not valid YAML"),
    ("all:\n\tk: 1\n", "is not valid YAML"),
    ("all: \0\n", "is not valid YAML"),
    ("- k\n- 1\n", "holds a list; expected `notebook: {...}`"),
    ("just text\n", "holds a str; expected"),
    ("02_beta:\n", "02_beta holds None; expected `parameter: value`"),
    ("02_beta: 3\n", "02_beta holds 3; expected `parameter: value`"),
    ("extends: [smoke]\n", "extends holds ['smoke']; expected the name of a profile"),
    ("extends: 3\n", "extends holds 3; expected the name of a profile"),
])
def test_what_is_no_profile_is_refused(root: Path, text: str, expected: str):
    path = profile(root, "own", text)
    message = refused("own")
    assert expected in message
    assert path in message


def test_bytes_that_are_no_text_are_refused(root: Path):
    (root / "notebooks" / "profiles" / "own.yaml").write_bytes(b"all:\n  model: \xff\xfe\n")
    assert "own.yaml is not valid YAML" in refused("own")


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parameter", "value"), [
    ("k", "1.5"), ("k", "five"), ("k", "true"), ("k", "'5'"), ("k", "null"), ("k", "[5]"),
    ("rate", "true"), ("rate", "'0.5'"), ("rate", ".nan"), ("rate", ".inf"), ("rate", "-.inf"),
    ("rate", "1e-3"),  # YAML 1.1 reads this as text, and silence would be worse
    ("model", "3"), ("model", "[a]"), ("quick", "1"), ("quick", "maybe"),
    ("grid", "0.5"), ("grid", "[0.5, .nan]"), ("grid", "[a]"), ("grid", "[true]"),
    ("seeds", "[1, 2.5]"), ("seeds", "[1, [2]]"), ("seeds", "{1: 2}"),
])
def test_a_value_of_another_type_is_refused_with_an_example(root: Path, parameter: str, value: str):
    path = profile(root, "own", f"01_alpha:\n  {parameter}: {value}\n")
    declared = declared_parameters(root / "notebooks" / "01_alpha.py")[parameter]
    for message in (refused(path), refused("smoke", f"{parameter}={value}")):
        assert f"{parameter} = " in message
        assert f"does not fit {declared.annotation} (" in message
        assert message.endswith(f"a valid value is for example {declared.default!r}")


def test_an_int_becomes_a_float_where_a_float_is_declared(root: Path):
    made = load(profile(root, "own", "01_alpha:\n  rate: 2\n  grid: [0, 1, 0.5]\n"))
    rate, grid = made.parameters["01_alpha"]["rate"], made.parameters["01_alpha"]["grid"]
    assert (rate, grid) == (2.0, [0.0, 1.0, 0.5])
    assert {type(x) for x in (rate, *grid)} == {float}


@given(st.integers() | st.floats() | st.booleans() | st.text() | st.none())
def test_a_float_parameter_takes_finite_numbers_and_nothing_else(value: object):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    parameter = Parameter("rate", "float", 0.5)
    if number and abs(value) < 1e300:
        assert parameter.check(value, "here") == float(value)
    elif not number or not math.isfinite(value):
        with pytest.raises(ProfileError, match="rate = "):
            parameter.check(value, "here")


# --- overrides ------------------------------------------------------------------------------------


def test_an_override_holds_wherever_it_is_declared_or_in_one_notebook():
    everywhere = load("smoke", ["k=7"]).parameters
    assert [everywhere[n]["k"] for n in everywhere] == [7, 7]
    for prefix in ("02", "02_beta", "02_b"):
        one = load("smoke", [f"{prefix}.k=7"]).parameters
        assert [one[n]["k"] for n in one] == [64, 7]
    both = load("laptop", ["model=../a b/c=d.gguf", "02.budget=0.5"]).parameters
    assert both["01_alpha"]["model"] == "../a b/c=d.gguf"
    assert both["02_beta"] == {"k": 6, "budget": 0.5}


def test_an_override_wins_over_the_profile_and_a_later_one_over_an_earlier():
    assert load("laptop", ["02.k=1"]).parameters["02_beta"]["k"] == 1
    assert load("laptop", ["k=1", "02.k=2"]).parameters["02_beta"]["k"] == 2
    assert load("laptop", ["02.k=2", "k=1"]).parameters["02_beta"]["k"] == 1


@pytest.mark.parametrize(("override", "expected"), [
    ("k", "override 'k' is not of the form [NOTEBOOK.]PARAMETER=VALUE"),
    ("kk=1", "override 'kk=1': unknown parameter 'kk'"),
    ("modle=x", "unknown parameter 'modle'; did you mean 'model'?"),
    ("02.model=x", "unknown parameter 'model' of 02_beta"),
    ("03.k=1", "override '03.k=1': no single notebook '03'"),
    ("0.k=1", "no single notebook '0'"),
    ("01_alfa.k=1", "no single notebook '01_alfa'; did you mean '01_alpha'?"),
    ("grid=[1", "override 'grid=[1' is not valid YAML"),
    ("k=", "k = None does not fit int"),
])
def test_overrides_that_fit_nothing_are_refused(override: str, expected: str):
    assert expected in refused("smoke", override)


def test_the_name_tells_overrides_apart_by_what_they_change():
    def name(*overrides: str) -> str:
        return load("laptop", overrides).name

    assert name() == "laptop"
    assert name("k=1").startswith("laptop+")
    assert name("k=1") == name("k=1")
    assert len({name(), name("k=1"), name("k=2"), name("01.k=1"), name("rate=1")}) == 5
    assert name("k=1", "rate=2") == name("rate=2", "k=1")
    # The same two in the other order mean something else.
    assert name("k=1", "02.k=2") != name("02.k=2", "k=1")


# --- the parameters cell --------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "k = 3", "k: int", "import os", "print(k)", "k: int = 1 + 1", "k: int = other",
    "a.b: int = 3", "k, m = 1, 2", "k: int = int('3')",
])
def test_a_parameters_cell_holds_nothing_but_typed_literals(root: Path, line: str):
    path = root / "notebooks" / "01_alpha.py"
    path.write_text(NOTEBOOK.format(line))
    with pytest.raises(ProfileError, match=r"01_alpha\.py.*in the parameters cell.*name: type = "):
        declared_parameters(path)


@pytest.mark.parametrize("line", ["k: Int = 3", "k: dict[str, int] = {}", "k: os.PathLike = 'x'"])
def test_a_parameter_has_one_of_the_plain_types(root: Path, line: str):
    path = root / "notebooks" / "01_alpha.py"
    path.write_text(NOTEBOOK.format(line))
    with pytest.raises(ProfileError, match="bool, float, int, list, str"):
        declared_parameters(path)


def test_a_default_must_fit_its_own_type(root: Path):
    path = root / "notebooks" / "01_alpha.py"
    path.write_text(NOTEBOOK.format("k: int = 2.5"))
    with pytest.raises(ProfileError, match=r"k = 2\.5 does not fit int"):
        declared_parameters(path)


def test_a_parameters_cell_that_is_no_python_is_refused(root: Path):
    path = root / "notebooks" / "01_alpha.py"
    path.write_text(NOTEBOOK.format("k: int = (3"))
    with pytest.raises(ProfileError, match=r"01_alpha\.py.*parameters cell"):
        declared_parameters(path)


@pytest.mark.parametrize("count", [0, 2])
def test_a_notebook_has_one_parameters_cell(root: Path, count: int):
    path = root / "notebooks" / "01_alpha.py"
    path.write_text("# %%\nprint(1)\n\n" + NOTEBOOK.format("k: int = 3\n") * count)
    with pytest.raises(ProfileError, match=f"has {count} cells tagged `parameters`; it needs one"):
        declared_parameters(path)
