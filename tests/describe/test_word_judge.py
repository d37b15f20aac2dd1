"""The judge of words, and those that cannot be had."""

import pytest

import saferclip_fast as sf
from saferclip_fast.describe import WordJudge, read_words
from saferclip_fast.describe.word_judge import open_judges
from saferclip_fast.generate.judges import judged
from tests.describe.test_describe import Length


def test_words_are_whole_and_of_any_case():
    judge = WordJudge({"sharp": ["knife", "razor blade", "Straße"], "odd": ["c++", "a.b"]})

    def kinds(text):
        return {kind for kind, p in judged(judge, [text])[0].items() if p == 1}

    for text in ("a KNIFE.", "knife", "(knife)", "one razor\n blade", "STRASSE"):
        assert kinds(text) == {"sharp"}, text
    for text in ("knives", "penknife", "knife_1", "razor, blade", "axb", "", "c+"):
        assert kinds(text) == set(), text
    assert kinds("knife in C++ code") == {"sharp", "odd"}


def test_words_are_read_line_by_line(tmp_path):
    file = tmp_path / "w.txt"
    file.write_text("\ufeff# mine\nsharp: knife, razor blade\n\nsharp: axe\nloud:  bang \n")
    assert read_words(file) == {"sharp": ["knife", "razor blade", "axe"], "loud": ["bang"]}
    for text, message in (
        ("knife\n", "w.txt, line 1: write CATEGORY: WORD, WORD"),
        ("a: b\nsharp: knife,, axe\n", "w.txt, line 2: there is nothing between two commas"),
        ("# none\n", "w.txt names no word"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_words(file)


def test_judges_that_cannot_be_had_are_named(tmp_path):
    for names, words, message in (
        ([], None, "nothing judges the texts"),
        (["clip"], None, "write words, or MODULE:FACTORY"),
        (["words"], None, "--judge words needs the words to look for"),
        (["json:nothing"], "w.txt", "--words is of --judge words"),
        (["json:nothing"], None, "has no attribute 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_judges(names, words)
    with pytest.raises(FileNotFoundError, match=r"cannot read .*none\.txt"):
        open_judges(["words"], str(tmp_path / "none.txt"))
    (own,) = open_judges([f"{Length.__module__}:Length"], None)
    assert own.name == "length" and judged(own, ["x" * 30])[0]["long"] == 0.5
    own.judge = lambda texts: [2]
    with pytest.raises(ValueError, match=r"the judge length gave .* for 1 texts"):
        judged(own, ["x"], "text")


def test_words_that_no_judge_asks_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--words is of --judge words"):
        sf.describe("hf-hub:a/b", "run", tmp_path, tmp_path / "out", judges=Length(), words="w.txt")
