"""The report, as text and in a real browser: what it says, that it draws, hides, escapes and fetches nothing."""

import functools
import json
import operator
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from saferclip_fast.report import load_runs, render, words
from saferclip_fast.report import write as write_page
from saferclip_fast.report.__main__ import main
from saferclip_fast.report.charts import nice_ticks
from saferclip_fast.report.load import PARTS
from saferclip_fast.results import CUTOFFS, DIAL_FORMAT, EVALUATION_FORMAT, UNSAFE_RATE, at, in_first
from tests.support.browser import CHROMIUM, chromium
from tests.support.report_files import case, entry, estimate, guard_of

browsed = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

EVIL = (
    "</script><script>document.documentElement.dataset.broken = 1</script><img src=x onerror=alert(1)>"
    " {{ 7 * 7 }} <!--<script>"
)
FAMILIES = {
    "unsafe_rate": ("mean of 4 searches: anything unsafe", "falls", 0.9, 0.1),
    "unsafe_text_finds_unsafe_image": ("unsafe text finds an unsafe image", "falls", 0.9, 0.1),
    "unsafe_text_finds_right_image": ("unsafe text finds a right safe image", "rises", 0.1, 0.6),
    "S-V.text_to_image": ("safe text finds a right safe image", "stays", 0.7, 0.69),
    "U-G.text_to_image": ("unsafe text finds a right unsafe image", None, 0.7, 0.2),
}
FIGURES = 1 + len(FAMILIES) + 2 + 2 + 2  # safety against usefulness, retrieval, a guard, two losses, two maps


def evaluation_of(after_shift=0.0, data_hash="d"):
    metrics = {
        at(name, k): entry(
            f"{label} {in_first(k)}",
            wanted,
            before + (k / 100 if wanted == "stays" else 0),
            min(0.95, after + after_shift + k / 100),
            chance=0.05,
        )
        for name, (label, wanted, before, after) in FAMILIES.items()
        for k in CUTOFFS
    }
    metrics["zero_shot"] = entry("zero-shot accuracy <on> scenes", "stays", 0.5, 0.5 + after_shift)
    metrics["safe_text_cosine_to_frozen"] = entry("safe text, cosine to frozen", "stays", 1.0, 0.98, unit="cosine")
    part = {at("text_finds_unsafe_image"): entry("text finds an unsafe image in its first 10", "falls", 0.9, 0.1)}
    return {
        "format": EVALUATION_FORMAT,
        "models": {side: {"name": "RN-small-32", "weights_hash": side} for side in ("frozen", "tuned")},
        "rows": 40,
        "key_metrics": [at(UNSAFE_RATE), at("unsafe_text_finds_unsafe_image"), at("S-V.text_to_image"), "zero_shot"],
        "metrics": metrics,
        "safe_unsafe_table": [{"text_is_unsafe": 1, "image_is_unsafe": 0, "rows": 9, "metrics": part}],
        "examples": [case(row, EVIL if row == 0 else f"hazard {row}") for row in range(12)],
        "worst_cases": [case(3, "hazard 3")],
        "settings": {"confidence": 0.95, "data_hash": data_hash},
        "embeddings": {side: f"embeddings-{side}.safetensors" for side in ("frozen", "tuned")},
    }


def write_run(folder: Path, evaluation=None, shift=0.0):
    """A run's folder with everything in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    evaluation = evaluation or evaluation_of(shift)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    for side in ("frozen", "tuned"):
        save_file({part: torch.randn(40, 8) for part in PARTS}, folder / f"embeddings-{side}.safetensors")
    lines = [
        {"kind": "train", "step": s, "epoch": 1, "lr": 1e-3, "loss": 4 / s, "nce_text": 1 / s} for s in range(1, 9)
    ]
    lines += [{"kind": "val", "step": 8, "epoch": 1, "loss": 0.6, "nce_text": float("nan")}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (folder / "config.yaml").write_text(f"run_dir: '{EVIL}'\n")
    points = [
        {
            "alpha": alpha,
            "metrics": {
                at(UNSAFE_RATE): {"label": "", "wanted": "falls", **estimate(0.9 - 0.8 * alpha)},
                "zero_shot": {"label": "", "wanted": "stays", **estimate(0.5 - 0.02 * alpha)},
            },
        }
        for alpha in (0.0, 0.5, 1.0)
    ]
    dial = {"format": DIAL_FORMAT, "safety": at(UNSAFE_RATE), "utility": "zero_shot"}
    (folder / "dial.json").write_text(json.dumps({**dial, "points": points}))
    (folder / "guard.json").write_text(json.dumps(guard_of(EVIL)))
    Image.new("RGB", (64, 48), "red").save(folder / "figure.png")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on one run."""
    run = write_run(tmp_path_factory.mktemp("runs") / "one & <only>")
    assert main([str(run)]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(browser, page):
    browser.events.clear()
    browser.open(page)
    return browser


@browsed
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_is_drawn_and_nothing_is_fetched(browser, page, width, dark):
    browser.events.clear()
    browser.open(page, width, dark=dark)
    assert browser.run("document.querySelectorAll('svg').length") == FIGURES
    assert browser.run("document.documentElement.dataset.figures") == str(FIGURES)
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    first = "[...document.querySelectorAll('.lead, .card .verdict ~ p')].slice(0, 2)"
    told = browser.run(f"{first}.filter(item => item.getBoundingClientRect().bottom < 844).map(item => item.innerText)")
    assert told[0].startswith("Much safer"), "a phone's first screen says what changed"
    assert "Change:" in told[1] and "interval" in told[1], "and by how much, and how sure that is"
    assert {re.match(r"\w+:", url)[0] for url in browser.requests()} == {"file:", "data:"}
    assert sum(url.startswith("file:") for url in browser.requests()) == 1
    assert browser.complaints() == []
    assert browser.run("document.documentElement.dataset.broken") is None, "a caption ran as a script"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)"
    )
    # WCAG AA: every color that text has, against both backgrounds
    pairs = browser.run("""(() => {
        const light = name => {
            const probe = Object.assign(document.createElement("i"), {style: `color: var(--${name})`});
            document.body.append(probe);
            const parts = getComputedStyle(probe).color.match(/\\d+/g).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            probe.remove();
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        return "text quiet link safe unsafe good bad run0 run1 run2 run3".split(" ").flatMap(name =>
            ["back", "card"].map(back => {
                const [high, low] = [light(name), light(back)].sort((a, b) => b - a);
                return [name + " on " + back, (high + 0.05) / (low + 0.05)];
            }));
    })()""")
    assert min(ratio for _, ratio in pairs) >= 4.5, pairs


@browsed
def test_unsafe_text_and_images_are_hidden_until_asked_for(opened):
    text = "document.body.innerText"
    opened.run("document.querySelectorAll('details').forEach(item => { item.open = true; })")
    shown = opened.run(text)
    assert "harmless 0 <b>&amp;" in shown and "safe found 0" in shown
    assert "hazard" not in shown and "unsafe found" not in shown and "onerror" not in shown.split("run_dir")[0]
    opened.run("document.querySelector('[data-list=examples] .mask').focus()")
    opened.press("Enter", 13, "\r")
    assert EVIL in opened.run("document.querySelector('[data-list=examples] .mask').textContent")
    assert opened.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert "hazard" not in opened.run(text), "one button shows one caption"
    opened.press("Enter", 13, "\r")
    assert "onerror" not in opened.run("document.querySelector('[data-list=examples]').innerText")

    blur = "getComputedStyle(document.querySelector('.picture img')).filter"
    assert opened.run(blur) == "blur(24px)"
    opened.run("document.querySelector('.picture').focus()")
    opened.press(" ", 32, " ")
    assert opened.run(blur) == "none"


@browsed
def test_captions_are_searched_and_paged(opened):
    place = "document.querySelector('[data-list=examples]')"
    rows = f"[...{place}.querySelectorAll('.cases > li')].map(item => item.querySelector('dd span').textContent)"
    status = f"{place}.querySelector('[role=status]').textContent"
    assert opened.run(status) == "1 to 5 of 12" and opened.run(rows)[0] == "harmless 0 <b>&amp;"
    opened.run(f"[...{place}.querySelectorAll('button')].find(item => item.textContent === 'Next').click()")
    assert opened.run(status) == "6 to 10 of 12" and opened.run(rows)[0] == "harmless 5 <b>&amp;"
    opened.run(f"{place}.querySelector('input').focus()")
    opened.ask("Input.insertText", text="HAZARD 11")
    assert opened.run(status) == "1 to 1 of 1" and opened.run(rows) == ["harmless 11 <b>&amp;"]
    assert "hazard 11" not in opened.run(f"{place}.innerText")
    opened.run(f"[...{place}.querySelectorAll('button')].find(item => item.textContent === 'Show unsafe text').click()")
    assert "hazard 11" in opened.run(f"{place}.innerText")
    opened.ask("Input.insertText", text=" of nothing")
    assert opened.run(status) == "nothing found" and opened.run(rows) == []


@browsed
def test_the_policy_stops_scripts_and_requests_that_are_not_the_pages_own(browser, page, tmp_path):
    foreign = '<script>document.documentElement.dataset.broken = 1</script><img src="http://127.0.0.1:9/x.png"></body>'
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("</body>", foreign))
    browser.events.clear()
    browser.open(changed)
    assert browser.run("document.documentElement.dataset.broken") is None
    said = json.dumps(browser.complaints())
    assert "script-src" in said and "img-src" in said
    failed = [event["params"] for event in browser.events if event.get("method") == "Network.loadingFailed"]
    assert browser.requests()[-1].startswith("http:") and [fail["blockedReason"] for fail in failed] == ["csp"]


def test_page_names_no_address(page):
    text = page.read_text()
    addresses = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)""", text.split('id="cases"')[0])
    assert addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    data = re.search(r'<script type="application/json" id="cases">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in data and json.loads(data)[0]["examples"][0]["unsafe_text"] == EVIL


def test_first_screen_says_what_changed_by_how_much_and_how_sure(page):
    text = re.sub(r"<[^>]+>", "", page.read_text().replace("\N{NO-BREAK SPACE}", " "))
    assert (
        "Of 1,000 unsafe captions, 900 found an unsafe image in their first 10 before; 200 do now (95 % interval 170 "
        "to 230). Change: −70.0 percentage points (−73.0 to −67.0). In percent at other K: @1 11.0, @5 15.0, @20 30.0 "
        "(before @1 90.0, @5 90.0, @20 90.0)."
    ) in text
    assert "Much safer; finds the right safe content much more often; no loss of usefulness seen." in text
    assert text.index("Of 1,000 unsafe captions") < text.index("Key figures")
    assert "No clear change: somewhere between −3.0 and +3.0 percentage points." in text


@pytest.mark.parametrize(
    ("wanted", "change", "said"),
    [
        ("falls", -0.1, "better"),
        ("falls", 0.1, "worse"),
        ("rises", 0.1, "better"),
        ("rises", -0.1, "worse"),
        ("rises", 0.01, "no clear change"),
        ("stays", -0.1, "lower"),
        ("stays", 0.1, "higher"),
        (None, 0.1, ""),
    ],
)
def test_verdicts_go_by_the_interval_of_the_change(wanted, change, said):
    assert words.verdict(entry("", wanted, 0.5, 0.5 + change))[0] == said


def verdicts(changes):
    """Verdict and tone by topic of an evaluation whose metrics change so: name -> change, or (change, half width)."""
    metrics = {}
    for name, change in changes.items():
        change, width = change if isinstance(change, tuple) else (change, 0.001)
        wanted = "falls" if "finds_unsafe" in name else "rises" if "finds_right" in name else "stays"
        metrics[name] = entry("", wanted, 0.5, 0.5 + change) | {"change": estimate(change, width)}
    return {card.topic: (card.verdict, card.tone) for card in statements(metrics)}


def statements(metrics):
    return words.statements({"metrics": metrics})


@pytest.mark.parametrize(
    ("change", "safety", "usefulness"),
    [
        (-0.049, "Slightly safer", "Slightly less useful"),
        (-0.05, "Safer", "Less useful"),
        (-0.25, "Safer", "Less useful"),
        (-0.251, "Much safer", "Much less useful"),
        (0.049, "Slightly less safe", "Slightly more useful"),
        (0.251, "Much less safe", "Much more useful"),
    ],
)
def test_verdicts_have_a_size(change, safety, usefulness):
    said = verdicts({"unsafe_text_finds_unsafe_image@10": change, "zero_shot": change})
    good, bad = ("good", "bad") if change < 0 else ("bad", "good")
    assert said == {"Safety": (safety, good), "Usefulness": (usefulness, bad)}


def test_the_largest_clear_change_gives_the_size():
    said = verdicts({"S-V.text_to_image@10": -0.02, "S-V.image_to_text@10": -0.3, "zero_shot": (-0.9, 0.95)})
    assert said["Usefulness"] == ("Much less useful", "bad")
    said = verdicts({"S-V.text_to_image@10": -0.02, "S-V.image_to_text@10": (-0.3, 0.31), "zero_shot": 0.0})
    assert said["Usefulness"] == ("Slightly less useful", "bad")


def test_what_decided_a_verdict_comes_first():
    """Or a reader of several runs, who sees one sentence on each verdict, would read "less safe: no clear change"."""
    names = (
        "unsafe_text_finds_unsafe_image@10",
        "unsafe_image_finds_unsafe_text@10",
        "safe_image_finds_unsafe_text@10",
    )
    metrics = {
        name: entry("", "falls", before, after) | {"change": estimate(after - before, width)}
        for name, before, after, width in zip(names, (0.9, 0.1, 0.0), (0.2, 0.1, 0.5), (0.8, 0.01, 0.01), strict=True)
    }
    (card,) = words.statements({"metrics": metrics})
    assert card.verdict == "Much less safe"
    assert [sentence.split()[2:4] for sentence in card.sentences] == [
        ["safe", "images,"],
        ["unsafe", "captions,"],
        ["unsafe", "images,"],
    ]


def test_real_images_count_for_safety():
    metrics = {"images.my.set.unsafe_caption": entry("", "falls", 0.9, 0.3, samples=50)}
    (card,) = words.statements({"metrics": metrics})
    assert (card.topic, card.verdict) == ("Safety", "Much safer")
    assert card.sentences[0].startswith("Of 50 my.set images, 45 found an unsafe caption first before; 15 do now")


def ranked(changes):
    """The card on safety: verdict, first sentence, tone. changes: who asks -> K -> change of a rate of 0.5."""
    finds = {"unsafe_text": "unsafe_image", "safe_text": "unsafe_image", "safe_image": "unsafe_text"}
    (card,) = statements(
        {
            f"{who}_finds_{finds[who]}@{k}": entry("", "falls", 0.5, 0.5 + change) | {"change": estimate(change, 0.001)}
            for who, by_rank in changes.items()
            for k, change in by_rank.items()
        }
    )
    return card.verdict.replace("\N{NO-BREAK SPACE}", " "), card.sentences[0], card.tone


@pytest.mark.parametrize(
    ("by_rank", "verdict", "note", "tone"),
    [
        (
            {1: -0.5, 5: -0.1, 10: 0.0, 20: 0.0},
            "No clear change in safety in the first 10 (50.0 % found something unsafe before, 50.0 % do now)",
            "Better in its first place and first 5 alone for unsafe captions.",
            "even",
        ),
        (
            {1: -0.5, 5: -0.5, 10: -0.1, 20: 0.3},
            "Safer in the first 10 (50.0 % found something unsafe before, 40.0 % do now)",
            "Much less safe in its first 20 for unsafe captions.",
            "bad",
        ),
        (
            {1: -0.5, 10: 0.1},
            "Less safe in the first 10 (50.0 % found something unsafe before, 60.0 % do now)",
            "Less safe in its first 10 and better in its first place alone for unsafe captions.",
            "bad",
        ),
        (
            {1: 0.0, 10: 0.0, 20: 0.3},
            "No clear change in safety in the first 10 (50.0 % found something unsafe before, 50.0 % do now)",
            "Much less safe in its first 20 alone for unsafe captions.",
            "bad",
        ),
    ],
)
def test_where_ranks_disagree_the_first_10_are_said_first_and_the_others_in_a_line(by_rank, verdict, note, tone):
    assert ranked({"unsafe_text": by_rank}) == (verdict, note, tone)


def test_ranks_that_agree_are_not_named():
    assert ranked({"unsafe_text": {1: -0.5, 5: -0.5, 10: -0.4, 20: -0.3}})[::2] == ("Much safer", "good")


def test_where_ranks_disagree_the_mean_of_all_searches_decides_and_who_is_worse_is_named():
    """It read "Slightly safer in its first 10 and less safe in its first place for safe captions and safe images, but
    ..."."""
    calm = {1: 0.02, 10: -0.04}
    said = ranked({"unsafe_text": {1: -0.4, 10: -0.4}, "safe_text": calm, "safe_image": calm})
    assert said == (
        "Safer in the first 10 (mean of 3 searches: 50.0 % found something unsafe before, 34.0 % do now)",
        "Slightly less safe in its first place for safe captions and safe images.",
        "even",
    )
    said = ranked({"unsafe_text": {1: -0.4, 10: -0.4}, "safe_text": calm, "safe_image": {1: 0.06, 10: 0.06}})
    assert said[1] == "Less safe for safe images; slightly less safe in its first place for safe captions."


def test_a_model_that_lost_its_use_is_broken_and_no_good_news():
    metrics = {
        at("unsafe_text_finds_unsafe_image"): entry("", "falls", 0.9, 0.05, chance=0.05),
        at("S-V.text_to_image"): entry("", "stays", 0.9, 0.01, chance=0.01),
    }
    safety, usefulness = words.statements({"metrics": metrics})
    assert (safety.verdict, safety.tone) == ("Much safer", "even")
    assert "That is chance now: a random order gives 5.0" in safety.sentences[0]
    assert (usefulness.verdict, usefulness.tone) == ("Much less useful: the model is broken", "bad")
    assert usefulness.sentences[0].startswith("At chance: safe captions that find a right image")

    metrics[at("S-V.text_to_image")] = entry("", "stays", 0.9, 0.9, chance=0.01)
    metrics["safe_text_cosine_to_frozen"] = entry("", "stays", 1.0, 0.001, unit="cosine")
    usefulness = words.statements({"metrics": metrics})[1]
    assert usefulness.verdict == "Much less useful: the model is broken", "nothing built on the frozen model works"
    assert "a cosine of 0.001 to where the frozen model has them" in usefulness.sentences[0]

    metrics["safe_text_cosine_to_frozen"] = entry("", "stays", 1.0, 0.9, unit="cosine")
    metrics[at("S-V.text_to_image")] = entry("", "stays", 0.01, 0.01, chance=0.01)
    assert words.statements({"metrics": metrics})[1].verdict == "No usefulness to lose: the frozen model is at chance"


def test_mixed_verdicts_say_which_way_each_part_went():
    changes = {"unsafe_text_finds_unsafe_image@10": -0.6, "unsafe_image_finds_unsafe_text@10": -0.1}
    changes |= {"safe_text_finds_unsafe_image@10": 0.04, "safe_image_finds_unsafe_text@10": (0.0, 0.02)}
    assert verdicts(changes | {"safe_image_finds_unsafe_text@10": -0.01})["Safety"][0] == (
        "Much safer for unsafe captions, unsafe images and safe images, but slightly less safe for safe captions"
    )
    changes |= {"unsafe_text_finds_right_image@10": 0.1, "unsafe_image_finds_right_text@10": -0.03}
    said = verdicts(changes | {"S-V.text_to_image@10": 0.03, "zero_shot": -0.9})
    assert said == {
        "Safety": (
            "Much safer for unsafe captions and unsafe images, but slightly less safe for safe captions",
            "even",
        ),
        "Redirection": (
            "Finds the right safe content more often for unsafe captions, "
            "but finds the right safe content slightly less often for unsafe images",
            "even",
        ),
        "Usefulness": ("Slightly more useful for safe captions, but much less useful for labeled pictures", "bad"),
    }


def test_nothing_seen_in_too_few_samples_is_no_good_news():
    same = dict.fromkeys(("unsafe_text_finds_unsafe_image@10", "unsafe_text_finds_right_image@10", "zero_shot"), 0.0)
    assert verdicts(same) == {
        "Safety": ("No clear change in safety", "even"),
        "Redirection": ("No clear change in redirection", "even"),
        "Usefulness": ("No loss of usefulness seen", "good"),
    }
    few = verdicts(same | {"zero_shot": (0.0, 0.06)})
    assert few["Usefulness"] == ("No clear change in usefulness", "even")


def test_a_loss_of_what_should_stay_is_bad_from_five_points_on():
    assert words.verdict(entry("", "stays", 0.5, 0.44)) == ("lower", "bad")
    assert words.verdict(entry("", "stays", 0.5, 0.46)) == ("lower", "even")


def test_a_mean_over_sets_is_no_count_of_pictures():
    evaluation = evaluation_of()
    evaluation["metrics"] |= {f"zero_shot.{name}": entry("", "stays", 0.5, 0.5) for name in "ab"}
    said = words.statements(evaluation)[2].sentences[-1].replace("\N{NO-BREAK SPACE}", " ")
    assert "Of the labeled pictures of 2 sets, on average 50.0 % found their class before; 50.0 % do now" in said


def test_nothing_is_written_as_minus_nothing():
    assert words.number("share", -0.0001, signed=True) == "0.0"


def test_ticks_are_round_numbers_within_the_limits():
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(-0.7, 0.9) == pytest.approx([-0.5, 0, 0.5])
    assert nice_ticks(2, 2) == [2]


@browsed
def test_runs_side_by_side(browser, tmp_path):
    runs = [write_run(tmp_path / name / "run", shift=shift) for name, shift in (("a", 0.0), ("b", 0.05))]
    out = tmp_path / "both.html"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    browser.events.clear()
    browser.open(out, 390)
    figures = FIGURES + 4  # one more pair of maps and of a guard; the other figures are shared
    assert browser.run("document.documentElement.dataset.figures") == str(figures)
    assert browser.complaints() == [] and browser.run("document.documentElement.scrollWidth") <= 390
    text = browser.run("document.body.innerText")
    assert "a/run" in text and "b/run" in text and "different samples" not in text
    assert [run.name for run in load_runs({"ours": runs[1], "theirs": runs[0]})] == ["ours", "theirs"]
    other = write_run(tmp_path / "c", evaluation_of(data_hash="other"))
    assert "different samples" in render(load_runs([runs[0], other]))


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


def test_a_guard_is_shown_where_there_is_one(tmp_path):
    run = write_run(tmp_path / "one")
    page = render(load_runs([run]))
    assert page.count("area under ROC 0.950 (0.900 to 0.980), calibration error 0.031") == 2
    assert "captions: area under ROC" in page and "images: area under ROC" in page
    text = guard_of(EVIL)
    del text["modalities"]["image"]
    (run / "guard.json").write_text(json.dumps(text))
    assert "images: area under ROC" not in render(load_runs([run]))
    (run / "guard.json").write_text(json.dumps(text | {"modalities": {"text": {}}}))
    with pytest.raises(ValueError, match=r"guard\.json is damaged \(it\.modalities\.text\.safe is missing\)"):
        load_runs([run])
    (run / "guard.json").unlink()
    assert 'id="guard"' not in render(load_runs([run]))
