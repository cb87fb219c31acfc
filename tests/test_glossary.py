"""Terms of the glossary are linked where they first occur in prose, and nowhere else."""

from hypothesis import given
from hypothesis import strategies as st

from lablog import glossary
from lablog.files import repository

NAMES = ["effective rank", "prior", "posterior", "z\\*", "KL divergence"]


def test_the_first_occurrence_in_prose_is_linked_once():
    seen: set[str] = set()
    text = glossary.linked("The Effective\nranks of contexts. An effective rank.", NAMES, seen)
    assert text == "The {term}`Effective ranks <effective rank>` of contexts. An effective rank."
    assert seen == {"effective rank"}
    assert glossary.linked("effective rank", NAMES, seen) == "effective rank"


def test_what_is_no_prose_is_left_alone():
    text = ("## The prior\n\n| prior | `prior` |\n$p_{prior}$ and {cite}`prior2016` and "
            "[the prior](prior.md) and\n$$ prior $$\n<b prior>, priority, a-prior")
    assert glossary.linked(text, NAMES, set()) == text
    assert glossary.linked(f"{text}. The prior.", NAMES, set()) == (
        f"{text}. The {{term}}`prior <prior>`.")


@given(st.lists(st.sampled_from(["prior", "posterior", "effective rank", "`prior`", "$x$", "a",
                                 "\n\n", "# prior\n", "|", "{cite}`b`"]), max_size=30))
def test_every_term_is_linked_at_most_once_and_nothing_else_changes(words: list[str]):
    text, seen = " ".join(words), set()
    told = glossary.linked(text, NAMES, seen)
    for name in NAMES:
        assert told.count(f" <{name}>`") == (name in seen)
    plain = told
    for name in seen:
        plain = plain.replace(f"{{term}}`{name} <{name}>`", name)
    assert plain == text


def test_the_glossary_has_the_symbols_of_the_chapters():
    terms = glossary.terms((repository() / "book" / "glossary.md").read_text())
    assert {"z\\*", "W_c", "λ", "C\\*", "w", "effective rank"} <= set(terms)
    assert len(terms) == len(set(terms))
