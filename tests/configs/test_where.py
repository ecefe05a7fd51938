"""Expressions of ``data.where``: what is read, what is refused in one sentence, and what they mean of columns."""

from __future__ import annotations

import pytest

from cliplift.configs.data import DataConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.where import (
    Column,
    Compared,
    Constant,
    Joined,
    Kind,
    Not,
    canonical_text,
    check_kinds,
    columns_of,
)
from cliplift.configs.where_reader import MAX_CHARACTERS, MAX_DEPTH, parse

KINDS: dict[str, Kind] = {
    "motion": "number", "height": "number", "width": "number", "duplicate": "boolean", "class": "text"
}  # fmt: skip


def test_the_example_of_the_documentation() -> None:
    found = parse("motion > 0.02 and height >= 240 and not duplicate")
    assert found == Joined(
        "and",
        (
            Compared(Column("motion"), ((">", Constant(0.02)),)),
            Compared(Column("height"), ((">=", Constant(240.0)),)),
            Not(Column("duplicate")),
        ),
    )
    assert columns_of(found) == ("duplicate", "height", "motion")
    check_kinds(found, KINDS)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a<1or b>2and c==3", "(a < 1.0) or ((b > 2.0) and (c == 3.0))"),
        ("not a == 1", "not (a == 1.0)"),
        ("1 - 2 - 3 > -x*2/4", "(1.0 - 2.0 - 3.0) > ((-x) * 2.0 / 4.0)"),
        (" ( (a) ) >= .5e-1", "a >= 0.05"),
        ("0 < a <= 1", "0.0 < a <= 1.0"),
        ("c not in ('x', \"y'z\", -1)", 'not (c in ("x", "y\'z", -1.0))'),
        ("c == 'say \"x\"'", "c == 'say \"x\"'"),
        ("d == true or d != false", "(d == true) or (d != false)"),
    ],
)
def test_strength_of_the_operators_and_one_form_of_text(text: str, canonical: str) -> None:
    assert canonical_text(parse(text)) == canonical
    assert canonical_text(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("motion >", "it ends where a value is expected"),
        ("motion = 1", "'=' at character 8 is not understood; write =="),
        ("a > 1 && b > 2", "'&' at character 7 is not understood; write and"),
        ("!a", "'!' at character 1 is not understood; write not"),
        ("a > 1 b", "'b' stands at character 7 where the end is expected"),
        ("(a > 1", "it ends where ')' is expected"),
        ("a in (b)", "'b' stands at character 7 where a number or a text is expected"),
        ("a in ()", "')' stands at character 7 where a value is expected"),
        ("a in (-'x')", "where a number or a text is expected"),
        ("and", "'and' stands at character 1 where a value is expected"),
        ("a > 1e999", "1e999 is too large a number"),
        ("'open", '"\'" at character 1 is not understood'),
        ("__import__('os').system('true')", "'.' at character 17 is not understood"),
        ("__import__('os')", "'(' stands at character 11 where the end is expected"),
        ("motion.__class__", "'.' at character 7 is not understood"),
        ("[x for x in y]", "'[' at character 1 is not understood"),
        ("a > 1; b", "';' at character 6 is not understood"),
        ("a\0 > 1", "at character 2 is not understood"),
        ("é > 1", "'é' at character 1 is not understood"),
        ("lambda: 1", "':' at character 7 is not understood"),
        ("(" * (MAX_DEPTH + 1) + "a", f"is nested more than {MAX_DEPTH} deep"),
        ("not " * 300 + "a", f"is nested more than {MAX_DEPTH} deep"),
        ("-" * 1900 + "a > 1", f"is nested more than {MAX_DEPTH} deep"),
        ("a > 1 or " * 300, f"has 2700 characters, more than {MAX_CHARACTERS}"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert says in str(refused.value)
    assert str(refused.value).startswith("data.where: ")
    assert "\n" not in str(refused.value)


def test_a_long_chain_is_read_without_depth() -> None:
    assert isinstance(parse(" or ".join(["a>1"] * 249)), Joined)
    assert canonical_text(parse("+".join(["a"] * 900) + ">1")).count("+") == 899


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mottion > 1", "there is no column 'mottion'; did you mean motion?"),
        ("zzz > 1", "there is no column 'zzz'; there are class, duplicate, height, motion, width"),
        ("sharpness > 1", "there is no column 'sharpness'; score it first"),
        ("motion", "motion is no condition"),
        ("motion + 1", "motion + 1.0 is no condition"),
        ("not motion", "motion is a number, where a boolean is needed"),
        ("motion and duplicate", "motion is a number, where a boolean is needed"),
        ("duplicate + 1 > 0", "duplicate is a boolean, where a number is needed"),
        ("-class > 0", "class is a text, where a number is needed"),
        ("motion == 'a'", 'motion == "a" compares a number with a text'),
        ("motion > true", "motion > true compares a number with a boolean"),
        ("class > 'a'", "a text is the same or not, and never less or more"),
        ("duplicate < true", "a boolean is the same or not"),
        ("class in ('a', 1)", "compares a text with a number"),
        ("'a' == 'a'", "compares no column with a text"),
        ("'a' == class", "compares no column with a text"),
        ("class == class", "compares no column with a text"),
    ],
)
def test_what_has_no_meaning_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_kinds(parse(text), KINDS, hints={"sharpness": "score it first"})
    assert says in str(refused.value)


def test_a_config_with_a_wrong_filter_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(ValueError, match="where: '=' at character 8 is not understood; write =="):
        DataConfig(shards=("s",), where="motion = 1")
    with pytest.raises(ValueError, match=r"where: .*a stream is read without an index"):
        DataConfig.model_validate(
            {"shards": "s", "where": "motion > 1", "sequential": {"tars": ["t.tar"], "samples_per_epoch": 3}}
        )
