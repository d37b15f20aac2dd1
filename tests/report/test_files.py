"""The files that the report reads: parts that are missing, damaged, or of another shape."""

import functools
import json
import operator

import pytest

from saferclip_fast.report import load_runs, render
from saferclip_fast.report import write as write_page
from saferclip_fast.report.__main__ import main
from saferclip_fast.results import EVALUATION_FORMAT, at
from tests.report.runs import FAMILIES, evaluation_of, write_run


def test_an_evaluation_alone_is_enough(tmp_path):
    evaluation = evaluation_of()
    for name in ("safe_unsafe_table", "examples", "worst_cases"):
        evaluation[name] = []
    del evaluation["embeddings"]
    del evaluation["models"]["frozen"]
    for metric in evaluation["metrics"].values():
        del metric["frozen"], metric["change"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = render(load_runs([tmp_path]))
    assert "Of 1,000 unsafe captions, 200 find an unsafe image in their first 10" in text.replace("\n", " ")
    assert text.count("<svg") == 1 + len(FAMILIES)


@pytest.mark.parametrize(
    "file", ["embeddings-tuned.safetensors", "dial.json", "log.jsonl", "config.yaml", "figure.png"]
)
def test_a_part_whose_file_is_missing_is_left_out(tmp_path, file):
    folder = write_run(tmp_path / "run")
    whole = render(load_runs([folder]))
    (folder / file).unlink()
    text = render(load_runs([folder]))
    assert len(text) < len(whole)
    assert ("Map of embeddings" in text) == (not file.startswith("embeddings"))


def test_mistakes_are_named(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    good = (run / "evaluation.json").read_text()

    def refused(*arguments):
        assert main([*map(str, arguments), "--out", str(tmp_path / "page.html")]) == 2
        assert not (tmp_path / "page.html").exists()
        return capsys.readouterr().err

    assert f"python -m saferclip_fast.evaluate {tmp_path}, or" in refused(tmp_path)
    for name in ("none", "run/evaluation.json"):
        assert f"{tmp_path}/{name} is no folder: give that of a run" in refused(tmp_path / name)
    assert "named twice" in refused(run, run)
    (run / "evaluation.json").write_text(good[:50])
    assert "evaluation.json is damaged" in refused(run)
    (run / "evaluation.json").write_text(good.replace(EVALUATION_FORMAT, "saferclip_fast.evaluation.v9"))
    assert "has format 'saferclip_fast.evaluation.v9'" in refused(run)
    (run / "evaluation.json").write_text(good.replace("embeddings-tuned", "../embeddings-tuned"))
    assert "outside its folder" in refused(run)
    (run / "evaluation.json").write_text(good)
    (run / "embeddings-tuned.safetensors").write_bytes(b"junk")
    assert "cannot read" in refused(run)


def places(value, path=()):
    """Every place in JSON, as the keys that lead there."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


NESTED = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize("file", ["evaluation.json", "dial.json"])
def test_json_of_any_other_shape_is_an_error_that_names_the_place(tmp_path, file):
    """Whatever stands in the place of a part, the page is drawn or a ValueError says what is wrong; nothing else."""
    run = write_run(tmp_path / "run", small(evaluation_of()))
    (run / "log.jsonl").unlink()  # drawing it takes time
    good = (run / file).read_text()
    refused = drawn = 0
    for *path, key in places(json.loads(good)):
        for wrong in (None, [], {}, 1e300, 10**400, float("nan"), "\ud800", NESTED, "missing"):
            whole = json.loads(good)
            part = functools.reduce(operator.getitem, path, whole)
            if wrong == "missing":
                del part[key]
            else:
                part[key] = wrong
            (run / file).write_text(json.dumps(whole))
            try:
                write_page([run], tmp_path / "page.html")
                drawn += 1
            except ValueError as error:
                assert file in str(error), str(error)
                refused += 1
    assert refused > drawn > 5


def test_a_change_is_checked_where_no_frozen_model_is_named(tmp_path):
    run = write_run(tmp_path / "run", small(evaluation_of()))
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["models"]["frozen"]
    name = evaluation["key_metrics"][0]
    del evaluation["metrics"][name]["change"]["high"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(ValueError, match=r"change\.high is missing"):
        write_page([run], tmp_path / "page.html")


def small(evaluation):
    """With few of everything."""
    kept = (at("unsafe_text_finds_unsafe_image"), "zero_shot")
    evaluation["metrics"] = {name: evaluation["metrics"][name] for name in kept}
    evaluation |= {
        "key_metrics": [kept[0]],
        "examples": evaluation["examples"][:1],
        "worst_cases": [],
        "embeddings": {},
    }
    return evaluation
