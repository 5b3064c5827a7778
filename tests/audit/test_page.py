"""audit.html as a person meets it: in a browser, from disk, by keyboard, on a phone, in the dark."""

import json
import os
import pathlib
import shutil

import audits
import planted
import pytest
import tiny_runs

from jaxtune.data import loader
from jaxtune.decode import decode
from jaxtune.inputs import open_reading

CHROMIUM = os.environ.get("JAXTUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FILE = "rows_of_a_source_with_a_name_that_is_longer_than_a_phone_is_wide_by_far.jsonl"
NASTY = "Close it: </script><script>document.title = 'broken'</script> <b>bold</b> & \u2028 end."


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The folder of an audit: twelve rows, of which the second is nasty, the third empty, the fifth a copy."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"instruction": planted.question(i), "output": planted.answer(i)} for i in range(12)]
    rows[1]["output"] = NASTY + " " + planted.answer(1)
    rows[2]["output"] = ""
    rows[4] = rows[3]
    tiny_runs.write_rows(folder / FILE, rows)
    audits.write_base(folder / "base")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXTUNE_CACHE", str(folder / "cache"))
    code, document = audits.run(folder / "base", folder / "out", *words(folder))
    patch.undo()
    assert code == 0, document["findings"]
    return folder


def words(folder: pathlib.Path) -> list[str]:
    return [f"data.train.0.path={folder / FILE}", "data.template=alpaca", "train.epochs=1"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, audited):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.problems, opened.asked = [], []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda said: opened.problems.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto((audited / "out" / "audit.html").as_uri())
    yield opened
    assert opened.problems == []
    context.close()


def stream_of(folder, *more):
    base = [f"model.path={folder / 'base'}", f"output={folder / 'run'}", *words(folder), *more]
    reading, config = open_reading(decode(base), needs_weights=False)
    return loader.open_stream(config, **reading.options)


def where(page):
    """Lines of the examples that are listed."""
    return [audits.line(text) for text in page.locator(".example .where").all_inner_texts()]


def test_the_page_opens_from_disk_and_asks_for_nothing_else(page, audited):
    assert page.asked == [(audited / "out" / "audit.html").as_uri()]
    assert page.title().startswith("Audit of") and page.locator("nav button").count() == 6


def test_what_the_data_says_is_shown_as_text_and_never_run(page):
    page.keyboard.press("3")
    page.fill("#search", "close it")
    page.locator(".example > button").first.click()
    page.locator("summary", has_text="As a conversation").click()
    assert NASTY.replace("\u2028", "") in page.locator(".turn").last.inner_text().replace("\u2028", "")
    assert page.title().startswith("Audit of") and page.locator(".turn b:text('bold')").count() == 0


def test_every_token_is_a_box_with_its_id_and_weight(page, audited):
    [result] = stream_of(audited).maker.readers[0].read([5])
    [example] = result.examples
    page.keyboard.press("3")
    page.fill("#search", "jsonl:6")
    page.locator(".example > button").first.click()
    boxes = page.locator(".tokens i")
    ids = [int(i) for i in boxes.evaluate_all("all => all.map(i => i.dataset.id)")]
    weights = [float(w) for w in boxes.evaluate_all("all => all.map(i => i.dataset.weight)")]
    assert ids == [*example.tokens.tolist(), int(example.targets[-1])]
    assert weights == [0.0, *example.weights.tolist()]
    assert page.locator(".tokens i.trained").count() == int((example.weights > 0).sum())
    specials = page.locator(".tokens i.special").evaluate_all("all => all.map(i => i.textContent)")
    assert specials == ["</s>"]
    page.locator(".tokens i.trained").first.hover()
    assert page.locator("#tip").inner_text().startswith(f"id {ids[weights.index(1.0)]} · weight 1 · ")


def test_packed_rows_show_their_segments_side_by_side(page, audited):
    window = stream_of(audited).maker.make(0)
    page.keyboard.press("4")
    rows = page.locator(".row")
    assert rows.count() == min(12, len(window.splits) - 1)
    assert rows.first.locator(".segment").count() == window.splits[1] - window.splits[0]
    tops = rows.first.locator(".segment").evaluate_all("all => all.map(s => s.getBoundingClientRect().top)")
    assert len(set(tops)) == 1


def test_problems_come_first_and_a_search_finds_the_rest(page):
    page.keyboard.press("3")
    first = where(page)
    assert first[0] == 3 and {3, 5} <= set(first)
    page.select_option("select[aria-label=problem]", "exact duplicate")
    assert where(page) == [5]
    page.select_option("select[aria-label=problem]", "")
    assert 8 not in where(page)
    page.fill("#search", planted.question(7).upper())
    assert where(page) == [8]


def test_verdicts_by_keyboard_are_saved_and_training_follows_them(page, audited, tmp_path):
    page.keyboard.press("3")
    page.select_option("select[aria-label=which]", "all")
    for line, key in ((6, "x"), (7, "y"), (8, "f")):
        page.fill("#search", f"jsonl:{line}")
        page.locator("#search").blur()
        page.keyboard.press("j")
        page.keyboard.press(key)
    page.locator("textarea[data-role=assistant]").fill("The lantern was mended by hand.")
    page.locator("[data-apply]").click()
    with page.expect_download() as caught:
        page.keyboard.press("s")
    caught.value.save_as(tmp_path / "verdicts.json")
    saved = json.loads((tmp_path / "verdicts.json").read_text())
    assert [verdict["verdict"] for verdict in saved["verdicts"]] == ["drop", "keep", "fix"]
    stream = stream_of(audited, f"data.verdicts={tmp_path / 'verdicts.json'}")
    reader = stream.maker.readers[0]
    dropped, fixed = reader.examine([5, 7])
    assert not dropped.result.examples and dropped.result.reason == "dropped by a verdict"
    assert fixed.conversations[0].messages[-1].content == "The lantern was mended by hand." and fixed.result.examples


def test_verdicts_outlive_a_reload_and_can_be_taken_back(page):
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.reload()
    page.keyboard.press("3")
    assert "verdicts: 1" in page.locator("#said").inner_text()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("u")
    assert "verdicts: 0" in page.locator("#said").inner_text()


@pytest.mark.parametrize("part", ["1", "2", "3", "4", "5", "6"])
def test_every_part_fits_a_phone(page, part):
    page.set_viewport_size({"width": 360, "height": 740})
    page.keyboard.press(part)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_and_light_are_told_apart(page):
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(251, 250, 247)", "rgb(21, 24, 28)"]


def test_tabs_are_reached_and_opened_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#tab-statistics").get_attribute("aria-selected") == "true"
    assert page.locator("figure").count() >= 8
