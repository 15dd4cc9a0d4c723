"""The paper's own runs of prefix tuning: its files, its sizes, and its rows on a tiny GPT-2 and a tiny BART."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import torch
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import harness, summaries, table_to_text
from experiments import prefix_ablation as table
from experiments import prefix_paper as paper
from peft_jax import models
from peft_jax.models.families import family

PAPER = paper.PAPER
pytestmark = pytest.mark.usefixtures("quick_compiles")

E2E = ["name : Zizzi | Type : pub||Zizzi is a pub . ", "name : Zizzi | Type : pub||A pub , Zizzi . "]
WEBNLG = {
    "entries": [
        {
            "1": {
                "modifiedtripleset": [
                    {"subject": "Aarhus", "property": "leaderName", "object": "Jacob_Bundsgaard"},
                    {"subject": "Aarhus", "property": "country", "object": "Denmark"},
                ],
                "lexicalisations": [
                    {"comment": "good", "lang": "", "lex": "Jacob Bundsgaard leads Aarhus, Denmark.", "xml_id": "Id1"},
                    {"comment": "toFix", "lang": "", "lex": "Aarhus in the Denmark.", "xml_id": "Id2"},
                ],
            }
        },
        {
            "2": {
                "modifiedtripleset": [{"subject": "Ajax", "property": "season", "object": "2014"}],
                "lexicalisations": [{"comment": "good", "lang": "", "lex": "Ajax played in 2014.", "xml_id": "Id1"}],
            }
        },
    ]
}
DART = [
    {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "North Carolina"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "WikiSQL", "text": "Mars Hill joined in 1973."}, {"source": "e2e", "text": " "}],
    },
    {"tripleset": [["Ajax", "TYPE", "Club"]], "annotations": [{"source": "e2e", "text": "Ajax is a club."}]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The four data sets' files, in the layout of the paper's repository."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("e2e_data", "webnlg_challenge_2017", "dart", "xsum"):
        (folder / name).mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"e2e_data/src1_{part}.txt").write_text("\n".join(E2E) + "\n", encoding="utf-8")
    for part in ("train", "dev", "test"):
        (folder / f"webnlg_challenge_2017/{part}.json").write_text(json.dumps(WEBNLG), encoding="utf-8")
        (folder / f"dart/dart-v1.1.1-full-{part}.json").write_text(json.dumps(DART), encoding="utf-8")
    for part in ("train", "val", "test"):
        (folder / f"xsum/{part}.source").write_text("A long\x85article.\nAnother one.\n", encoding="utf-8")
        (folder / f"xsum/{part}.target").write_text("Short.\nLess.\n", encoding="utf-8")
    return folder


# -- files ------------------------------------------------------------------------------------------------------------


def test_tables_are_laid_out_as_in_the_papers_code(data):
    assert table_to_text.read(data, "e2e", "valid")[0] == ("name : Zizzi | Type : pub", "Zizzi is a pub .")
    first = "| Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark"
    train, test = (table_to_text.read(data, "webnlg", part) for part in ("train", "test"))
    assert train == [
        (first, "Jacob Bundsgaard leads Aarhus, Denmark."),
        ("| Ajax : season : 2014", "Ajax played in 2014."),
    ]
    assert [text for given, text in test if given == first][1:] == ["Aarhus in the Denmark."]
    assert table_to_text.read(data, "dart", "train") == [
        ("Mars Hill : joined : 1973 | Mars Hill : location : North Carolina", "Mars Hill joined in 1973."),
        ("Ajax : type : Club", "Ajax is a club."),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("webnlg", "{", r"train.json is not JSON"),
        ("webnlg", "[]", r"train.json is not of WebNLG: \{\"entries\""),
        (
            "webnlg",
            '{"entries": [{"1": {"modifiedtripleset": []}}]}',
            r"train.json, entry 1 is not of WebNLG: KeyError",
        ),
        ("dart", "{}", r"train.json is not of DART: a list of entries is"),
        ("dart", '[{"tripleset": [["a", "B"]], "annotations": []}]', r"entry 1 is not of DART: ValueError"),
        ("dart", "[]", r"train.json is empty"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, name, content, message):
    path = tmp_path / table_to_text.FILES[name][0].format("train")
    with pytest.raises(FileNotFoundError, match="is not there: give a folder like data/ of XiangLi1999/PrefixTuning"):
        table_to_text.read(tmp_path, name, "train")
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        table_to_text.read(tmp_path, name, "train")


def test_articles_and_summaries_are_paired(data, tmp_path):
    pairs = summaries.read(data / "xsum", "valid")
    assert pairs == [("A long\x85article.", "Short."), ("Another one.", "Less.")]
    rows = summaries.rows(pairs, toy_tokenizer.roberta(), 2, (9, 4))
    text = toy_tokenizer.roberta().decode
    assert (
        text(rows["tokens"][1]) == "<s>Another</s>"
        and rows["mask"].sum() == 18
        and (rows["decoder_tokens"][:, 0] == 2).all()
    )
    assert [text(row) for row in rows["targets"]] == ["<s>Sh</s>", "<s>Le</s>"]
    assert [text(row) for row in rows["decoder_tokens"]] == ["</s><s>Sh", "</s><s>Le"]
    long = summaries.rows(pairs, toy_tokenizer.roberta(), 2, (32, 10))
    assert long["weights"].sum(1).tolist() == [8, 7] and long["mask"].sum(1).tolist() == [18, 14]
    with pytest.raises(FileNotFoundError, match=r"val.source is not there: give the folder above xsum/"):
        summaries.read(tmp_path, "valid")
    (tmp_path / "val.source").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "val.target").write_text("one\n", encoding="utf-8")
    with pytest.raises(ValueError, match="valid: 2 articles and 1 summaries"):
        summaries.read(tmp_path, "valid")
    (tmp_path / "val.target").write_text("one\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="valid: line 2 is empty"):
        summaries.read(tmp_path, "valid")


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_paper_rows_are_traced_at_their_true_size() -> None:
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    params = jax.eval_shape(lambda key: models.from_config(config, key).params, jax.random.key(0))
    forward = family("gpt2").build(config)

    def count(name: str) -> int:
        init = paper.method_of(PAPER.settings, PAPER.rows[name], 24).init
        return pj.count(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).trainable

    kept = 2 * 24 * 1024
    mlp = lambda length: length * 1024 + 1024 * 512 + 512 + 513 * kept  # noqa: E731
    assert count("e2e-prefix-5") == count("webnlg-prefix-5") == mlp(5) and count("dart-prefix-10") == mlp(10)
    assert count("e2e-embedding-20") == 20 * 1024 and count("e2e-infix-20") == mlp(20)
    whole, layer = 354_823_168, 12 * 1024**2 + 13 * 1024
    assert count("e2e-full") == whole and count("e2e-top-2") == 2 * layer + 50257 * 1024 + 2 * 1024


def test_the_papers_hyperparameters() -> None:
    rows = PAPER.rows
    given = {name: (row.rate, row.epochs, row.batch, row.length) for name, row in rows.items() if row.kind == "prefix"}
    assert given["e2e-prefix-5"] == (8e-5, 5, 10, 5) and given["webnlg-prefix-5"] == (5e-5, 5, 5, 5)
    assert given["dart-prefix-10"] == (5e-5, 10, 5, 10) and given["xsum-prefix-100"] == (5e-5, 30, 14, 100)
    assert len(rows) == 7 + 9 + 3 and table.TABLE.profiles["paper"] is PAPER
    train, read = PAPER.places(PAPER.settings, rows["e2e-prefix-5"])
    assert train == 5 * (42_061 // 10) * 10 * 128 and read == 4_672 * 128 + 630 * 5 * 100


# -- rows, on tiny models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny random models under the names of the paper's, with tokenizers of bytes."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(
        vocab_size=257, n_positions=160, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2-medium")
    toy_tokenizer.gpt2().save_pretrained(folder / "gpt2-medium")
    bart = transformers.BartConfig(
        vocab_size=261,
        max_position_embeddings=160,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    transformers.BartForConditionalGeneration(bart).save_pretrained(folder / "bart-large")
    toy_tokenizer.roberta().save_pretrained(folder / "bart-large")
    return folder


TINY = dataclasses.replace(
    PAPER.settings,
    steps=2,
    hidden=8,
    hidden_xsum=8,
    beams=2,
    beams_xsum=2,
    new_tokens=4,
    size=2,
    longest=128,
    summary=9,
)


def outcome(folder, data, name):
    sources = PAPER.load(TINY, str(folder), str(data))
    return paper.run(sources, TINY, dataclasses.replace(PAPER.rows[name], batch=2), 0)


def test_a_table_row_takes_real_steps(folder, data):
    found = outcome(folder, data, "e2e-infix-10")
    assert found.trainable == 10 * 32 + 32 * 8 + 8 + 9 * 2 * 2 * 32
    assert found.metrics["loss"] == pytest.approx(math.log(257), abs=0.4) and found.metrics["bleu"] >= 0
    assert found.train.places > found.train.tokens > 0 and found.evaluate.tokens > 0


def test_a_summary_row_takes_real_steps(folder, data):
    mlp = 5 * 32 + 32 * 8 + 8 + 9 * 2 * 2 * 32  # of each of three prefixes
    found = outcome(folder, data, "xsum-prefix-5")
    assert found.trainable == 3 * mlp and found.metrics["loss"] == pytest.approx(math.log(261), abs=0.4)
    assert found.metrics.keys() == {m.name for m in PAPER.parts[2].metrics} and found.evaluate.tokens > 0


def test_a_row_is_run_and_recorded_by_the_harness(folder, data, tmp_path):
    row = dataclasses.replace(PAPER.rows["dart-prefix-10"], batch=2)
    parts = (dataclasses.replace(PAPER.parts[0], rows=(row,)),)
    made = harness.Table("prefix_ablation", "", "", {"paper": dataclasses.replace(PAPER, settings=TINY, parts=parts)})
    options = {"seeds": (0,), "dirty": True, "results": tmp_path, "say": lambda text: None}
    (path,) = harness.run(made, "paper", model=str(folder), data=str(data), **options)
    result = json.loads(path.read_text())
    assert result["config"]["model"] == folder.name and result["row"] == "dart-prefix-10"
    assert np.isfinite(list(result["metrics"].values())).all()
