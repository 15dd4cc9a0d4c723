"""The parameter counts that the papers print: the library's own, of abstract models of the true size."""

import dataclasses

import jax
import pytest

import peft_jax as pj
from experiments import parameter_counts as table


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_the_library_counts_what_is_exact(row):
    assert table.count(row) == row.exact


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.name)
def test_what_is_printed_agrees_or_says_why(row):
    assert table.agrees(row) is (row.why == "")


def test_adaloras_figures_lie_within_what_its_budgets_allow():
    found = {budget.rank: (*table.bounds(budget), table.shown(budget.printed)[0]) for budget in table.BUDGETS}
    # 48 matrices of 768 x 768 and 24 of 768 x 3072, in triplets of 1,537 and of 3,841 numbers.
    assert found[8][:2] == (576 * 1537, 24 * 12 * 3841 + 288 * 1537)
    assert found[2][:2] == (144 * 1537, 24 * 4 * 3841 + 48 * 1537)
    assert all(low < printed < high for low, high, printed in found.values())
    assert found[8][0] < 12 * 8 * (4 * 1537 + 2 * 3841) == 1_327_680 < found[8][1]


@pytest.mark.parametrize(("model", "total"), table.TOTALS.items())
def test_t5_has_its_published_size(model, total):
    assert pj.count(table.abstract(model)[0]).frozen == total


def test_no_weight_is_made():
    params, _ = table.abstract("GPT-3")
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    assert pj.count(params).frozen > 174e9


def test_figures_agree_to_their_last_digit():
    row = table.ROWS[0]
    seen = {printed: table.agrees(dataclasses.replace(row, printed=printed, exact=24_576)) for printed in FIGURES}
    assert seen == FIGURES
    with pytest.raises(ValueError, match=r"'about 3' is not a printed figure, as 0.3M"):
        table.shown("about 3")


FIGURES = {"24.6K": True, "24.5K": True, "24.4K": False, "24.7K": False, "0.02M": True, "24,576": True, "24,577": False}


def test_the_table_has_every_row():
    text = table.report()
    assert all(f"| {row.model} | {row.words} | {row.exact:,} | {row.printed} |" in text for row in table.ROWS)
    assert len(text.splitlines()) == len(table.ROWS) + 2 + 2
    assert len({(row.name, row.where) for row in table.ROWS}) == len(table.ROWS)
