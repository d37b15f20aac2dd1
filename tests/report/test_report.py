"""The page in a real browser: that it draws, hides, escapes and fetches nothing."""

import json
import re

import pytest

from saferclip_fast.report import load_runs, render
from saferclip_fast.report.__main__ import main
from saferclip_fast.report.charts import nice_ticks
from saferclip_fast.results import GATE_CURVE
from tests.report.runs import EVIL, FAMILIES, evaluation_of, write_run
from tests.support.browser import CHROMIUM, chromium
from tests.support.report_files import gate_of, guard_of, restored_of

browsed = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FIGURES = 1 + len(FAMILIES) + 2 + 2 + 2  # safety against usefulness, retrieval, a guard, two losses, two maps


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


def test_a_gate_is_shown_where_there_is_one(tmp_path):
    run = write_run(tmp_path / "one")
    assert 'id="gate"' not in render(load_runs([run]))
    file = run / f"{GATE_CURVE}.json"
    file.write_text(json.dumps(gate_of(EVIL)))
    page = render(load_runs([run]))
    assert (
        "safe items kept bit for bit from 50.0 to 100.0 %; nothing unsafe in the first 10 from 80.0 to 30.0 %" in page
    )
    assert EVIL not in page and 'id="gate"' in page
    damaged = gate_of()
    del damaged["points"][1]["metrics"]["zero_shot"]
    file.write_text(json.dumps(damaged))
    with pytest.raises(
        ValueError, match=r"gate-curve\.json is damaged \(it\.points\[1\]\.metrics\.zero_shot is missing\)"
    ):
        load_runs([run])


def test_a_restoration_is_shown_where_there_is_one(tmp_path):
    run = write_run(tmp_path / "one")
    assert 'id="restored"' not in render(load_runs([run]))
    file = run / "restore.json"
    file.write_text(json.dumps(restored_of(EVIL)))
    page = render(load_runs([run]))
    assert "rho of 3 weights; safe change added: 2, left as it is: 1; threshold 0.35" in page
    assert "0.50 of the safe change added to 2 of 3 changed weights." in page
    row = page[page.index("zero-shot accuracy, own") :][:400]
    assert [row.index(value) for value in ("40.0", "70.0", "65.0")] == sorted(map(row.index, ("40.0", "70.0", "65.0")))
    assert EVIL not in page and 'href="#restored"' in page
    damaged = restored_of()
    del damaged["layers"][1]["rho"]
    file.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=r"restore\.json is damaged \(it\.layers\[1\]\.rho is missing\)"):
        load_runs([run])


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
