"""The sentiment lab: labels, measures and openings by hand, and a tiny run that is resumed."""

import doctest
import json
import math
import re
import shutil

from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.evaluation.policy import EvalResult
from minirlhf.lab import common, sentiment, sentiment_page, sentiment_task
from minirlhf.run.errors import UserError

import numpy as np
import pytest
import tiny
from test_pretrained import pretrained_folder


@pytest.fixture
def word_list(monkeypatch):
    """The scorer where VADER is not installed."""
    scorer = ("a list of words", sentiment_task.word_list_score)
    monkeypatch.setattr(sentiment_task, "scorer", lambda: scorer)


def test_the_word_list_counts_good_and_bad_words(word_list):
    assert doctest.testmod(sentiment_task).failed == 0
    assert sentiment_task.gold("A sad day.", "Good, GOOD! But late") == math.tanh(1)
    assert sentiment_task.gold("", "goods") == 0.0


def test_a_label_is_drawn_with_the_stated_probability(monkeypatch):
    """sigmoid((0.5 - 0.25) / 0.25) = sigmoid(1) = 0.731; 4,000 labels have s.e. 0.007."""
    monkeypatch.setattr(sentiment_task, "scorer", lambda: ("", dict(a=0.5, b=0.25).get))
    assert sentiment_task.preference_probability("", "a", "b") == pytest.approx(0.7310586)
    assert sentiment_task.preference_probability("", "b", "a") == pytest.approx(0.2689414)
    records = [sentiment_task.labeled(number, "p", ["b", "a", "a"]) for number in range(4000)]
    for pair, probability in (((1, 0), 0.731), ((2, 0), 0.731), ((1, 2), 0.5)):
        share = np.mean([[*pair] in record["preferences"] for record in records])
        assert share == pytest.approx(probability, abs=0.03)
    assert all(len(record["preferences"]) == 3 for record in records)
    assert sentiment_task.labeled(7, "p", ["b", "a", "a"]) == records[7]


def test_measures_of_responses_by_hand():
    assert sentiment_page.distinct_words("Good, good day. It's a day!") == 4
    assert sentiment_page.repeats("so so, SO good")
    assert not sentiment_page.repeats("so so good so")
    texts = ["good good good", "a fine day"]
    numbers = np.array([1.0, 0.0])
    row = sentiment_page.describe(EvalResult(texts, numbers, 2 * numbers, *[numbers] * 3))
    assert (row["gold"], row["score"], row["distinct"], row["repeats"]) == (1.0, 0.5, 2.0, 0.5)


def test_the_table_compares_each_seed_with_its_own_base_model():
    best = [dict(n=2, gold=0.5, score=0.6, kl_bound=0.19)]
    base = [
        dict(gold=0.0, score=0.0, kl=0.0, length=24.0, distinct=10.0 * s, repeats=0, best_of_n=best)
        for s in (1, 2)
    ]
    policy = [row | dict(gold=0.3, kl=4.0, distinct=8.0) for row in base]
    table = sentiment_page.result_table(base, {"--kl-coef 1": policy})
    assert "| base model, best of 2 | +0.50 ± 0.00 | +0.60 ± 0.00 | 0.2 ± 0.0 |  |  |  |" in table
    assert "| 60% ± 254% |" in table  # 80% and 40%: t = 12.706 times a standard error of 20%


def test_an_opening_is_plain_english_cut_between_words():
    encoding = load_tokenizer()
    text = "I ordered a blue kettle and a red lamp but they are late."
    (found,) = sentiment_task.opening(text, encoding, 0)
    assert text.startswith(found + " ")
    assert 8 <= len(encoding.encode_ordinary(found)) <= 12
    several = {sentiment_task.opening(text, encoding, seed)[0] for seed in range(20)}
    assert len(several) > 1
    for other in ("Too short", "x = 1; " + text, text.replace(" blue", "\n**blue")):
        assert sentiment_task.opening(other, encoding, 0) == []


def test_wrong_inputs_are_refused(word_list, capsys, tmp_path):
    lab = sentiment.main, sentiment.SentimentConfig
    out = ["--out", str(tmp_path / "out")]
    assert "pip install vaderSentiment" in tiny.refused(capsys, *lab, ["--init", "x", *out])
    assert "no such file" in tiny.refused(capsys, *lab, ["--quick", "--init", "none", *out])
    (tmp_path / "few.txt").write_text("One opening\n\nAnother\n")
    flags = ["--quick", "--prompts", str(tmp_path / "few.txt"), *out]
    assert "only 2 different openings" in tiny.refused(capsys, *lab, flags)


def test_the_prompts_of_a_pretrained_model_have_no_chat_template(word_list, tmp_path):
    """Even if its folder has one; and the data is written once."""
    folder = tmp_path / "model"
    pretrained_folder(folder, max_position_embeddings=64)
    path = folder / "tokenizer_config.json"
    options = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(options | dict(chat_template="<|im_start|>' + message")))
    config = sentiment.SentimentConfig(str(folder), str(tmp_path / "out"), quick=True)
    common.lab_folder(config.out)
    sentiment.write_data(config)
    pairs = tiny.rows(tmp_path / "out" / "pairs.jsonl")
    tests = tiny.rows(tmp_path / "out" / "test_pairs.jsonl")
    prompts = [row["prompt"] for row in tiny.rows(tmp_path / "out" / "prompts.jsonl")]
    assert [pair["prompt"] for pair in tests + pairs] == prompts
    assert (len(tests), len(pairs)) == (12, 28)
    assert set(prompts) <= set(sentiment_task.REQUESTS)
    before = tiny.contents(tmp_path / "out")
    sentiment.write_data(config)
    assert tiny.contents(tmp_path / "out") == before


@pytest.mark.slow
def test_the_sentiment_lab_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    config = sentiment.SentimentConfig(out=str(tmp_path / "out"), seeds=1, quick=True)
    page = sentiment.main(config)
    assert page.startswith("The study, and the runs of seed 0:\n\n```\npython -m minirlhf.lab.")
    assert "A quick run: no number means anything." in page
    assert page.count("**before**") == 12
    path = tmp_path / "out" / "runs.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[: complete.index(b'"policy-kl0.25') + 40])  # killed while writing
    monkeypatch.setattr(common, "start", lambda *_: pytest.fail("a finished run was repeated"))
    assert sentiment.main(config) == page
    assert path.read_bytes() == complete
    with pytest.raises(UserError, match="other settings"):
        sentiment.main(sentiment.SentimentConfig(out=config.out, prompts="x", quick=True))


def test_the_published_page_is_drawn_again_from_its_runs(tmp_path, monkeypatch):
    """Without the model and the scorer. The table of the lab's page has the same numbers."""
    published = tiny.ROOT / "data" / "studies" / "sentiment"
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "data" / "studies" / "sentiment"
    copy.mkdir(parents=True)
    shutil.copy(published / "runs.jsonl", copy)
    (copy / ".lab").touch()
    config = sentiment.SentimentConfig("smollm2", "data/studies/sentiment")
    page = sentiment.main(config)
    assert page == (published / "sentiment.md").read_text()
    text = (tiny.ROOT / "minirlhf" / "lab" / "README.md").read_text()
    for kl_coef in ("0.05", "0.15"):
        numbers = {}
        for source in (page, text):
            (row,) = re.findall(rf"^\| `?--kl-coef {kl_coef}`? \|(.*)\|$", source, re.M)
            numbers[source] = [cell.strip() for cell in row.split("|")]
        truth, score, kl, _, *rest = numbers[page]
        assert numbers[text][:4] == [truth, score, kl, rest[0]]
