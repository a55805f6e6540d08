"""Pages as a browser shows them: nothing overlaps, sticks out, is empty, or is too small or too faint to read."""

import re
from dataclasses import replace

import pytest
from browser import ADVICE, DESK, PHONE, Browser, find_browser

from groundup.report.comparison import render_comparison
from groundup.report.page import render
from groundup.report.read import read_run

pytestmark = [pytest.mark.costly, pytest.mark.skipif(find_browser() is None, reason=ADVICE)]

LOOK = """(() => {
  const found = {charts: [], wide: [], faint: [], small: [], overlaps: [], outside: []};
  const box = element => element.getBoundingClientRect();
  const isShown = element => box(element).width > 0 && box(element).height > 0;
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const pairs = (elements, where) => elements.forEach((one, number) => elements.slice(number + 1).forEach(other => {
    if (meet(box(one), box(other))) found.overlaps.push(`${where}: "${one.textContent}" "${other.textContent}"`); }));
  const shade = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(each => (each /= 255) <= .03928 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = element => { for (; element; element = element.parentElement) { const colour = getComputedStyle(element).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour; } return 'rgb(255, 255, 255)'; };
  for (const svg of [...document.querySelectorAll('svg')].filter(isShown)) {
    const texts = [...svg.querySelectorAll('text')], frame = box(svg), label = svg.getAttribute('aria-label');
    const curves = [...svg.querySelectorAll('path')].filter(each => /--series/.test(each.getAttribute('style')) && box(each).width > 20);
    found.charts.push({label, texts: texts.map(each => each.textContent), curves: curves.length});
    pairs(texts, label);
    for (const text of texts) { const {left, right, top, bottom} = box(text);
      if (left < frame.left - 1 || right > frame.right + 1 || top < frame.top - 1 || bottom > frame.bottom + 1) found.outside.push(`${label}: ${text.textContent}`);
      if (parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width < 9.5) found.small.push(`${label}: ${text.textContent}`); }
  }
  for (const part of document.querySelectorAll('.legend, .tiles > div, nav, .switch, .bars > div, tr')) pairs([...part.children].filter(each => isShown(each) && !each.matches('.track')), part.className || part.tagName);
  for (const element of [...document.querySelectorAll('body *')].filter(isShown)) {
    if (box(element).right > document.documentElement.clientWidth + 1 && !element.closest('.wide, pre')) found.wide.push(element.outerHTML.slice(0, 80));
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const inks = [element.closest('svg') ? getComputedStyle(element).fill : getComputedStyle(element).color, ground(element)].map(shade);
    if ((Math.max(...inks) + .05) / (Math.min(...inks) + .05) < 4.5) found.faint.push(element.textContent.slice(0, 40));
    if (!element.closest('svg') && parseFloat(getComputedStyle(element).fontSize) < 12) found.small.push(element.textContent.slice(0, 40));
  }
  found.scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(finished_run, tmp_path_factory):
    """A run's page, and one of two runs, of which one has a long name."""
    folder, run = tmp_path_factory.mktemp("pages"), read_run(finished_run)
    (folder / "one.html").write_text(render(run), encoding="utf-8")
    shorter = replace(
        run.stages[0], loss=run.stages[0].loss.__class__(*(side[:50] for side in _sides(run.stages[0].loss)))
    )
    other = replace(run, name="a-second-run-with-a-longer-name", stages=(shorter, *run.stages[1:]))
    (folder / "two.html").write_text(render_comparison([run, other]), encoding="utf-8")
    return folder


def _sides(points):
    return points.steps, points.values


def is_readable(found, *, num_charts):
    """What is wrong with a page as it was seen."""
    assert len(found["charts"]) == num_charts
    for chart in found["charts"]:
        told = re.fullmatch(r"(.+), (.+), over (.+)", chart["label"])
        assert told, f"an axis without a unit: {chart['label']!r}"
        assert {told[2], told[3]} <= set(chart["texts"]), chart
        assert chart["curves"] >= 1, f"an empty panel: {chart['label']!r}"
        assert len(chart["texts"]) >= 6, chart  # two ticks an axis at least
    for fault in ("overlaps", "outside", "small", "faint", "wide"):
        assert not found[fault], f"{fault}: {found[fault][:6]}"
    assert found["scroll"] <= 0


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE, 320])
def test_page_of_a_run(browser, pages, tmp_path, width, is_dark):
    browser.open(pages / "one.html", width=width, is_dark=is_dark)
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    is_readable(browser.evaluate(LOOK), num_charts=21)
    assert browser.picture(tmp_path / "page.png").stat().st_size > 10_000
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == is_dark


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_page_of_two_runs_over_each_axis(browser, pages, width):
    browser.open(pages / "two.html", width=width)
    shown = {}
    for axis in ("steps", "tokens", "FLOPs", "time"):
        browser.evaluate(f"document.getElementById('by-{axis}').click()")
        found = browser.evaluate(LOOK)
        is_readable(found, num_charts=len(found["charts"]))
        shown[axis] = [re.search("over (.+)", chart["label"])[1] for chart in found["charts"]]
    assert set(shown["steps"]) == {"step"} and len(shown["steps"]) == 12
    assert "tokens" in shown["tokens"] and "seconds of training" in shown["time"]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            "document.querySelector('svg text').parentElement.appendChild(document.querySelector('svg text').cloneNode(true))",
            "overlaps",
        ),
        ("document.querySelector('h1').style.width = '900px'", "wide"),
        ("document.querySelector('p').style.color = 'var(--ground)'", "faint"),
        ("document.querySelector('.hint').style.fontSize = '7px'", "small"),
        ("document.querySelector('svg text').setAttribute('transform', 'translate(900 0)')", "outside"),
    ],
)
def test_look_finds_what_is_wrong(browser, pages, spoil, fault):
    browser.open(pages / "one.html", width=PHONE)
    browser.evaluate(f"{{ {spoil} }}")
    assert browser.evaluate(LOOK)[fault]
