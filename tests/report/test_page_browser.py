"""The page in a real browser: it is drawn, it answers, and nothing that a run says is executed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.report.page import write_report
from grpo_cli.report.run import read_run
from tests.report.browser import Tab, launched, policy_of, served
from tests.report.run_folders import MadeUp, write_run

pytestmark = pytest.mark.slow

SCREENSHOTS = Path(__file__).parent / "screenshots"
"""Pictures of what the tests saw, to be looked at."""

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&lt;b&gt;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as one:
        yield one


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    one = Tab(browser)
    yield one
    one.page.close()


def made(folder: Path, *runs: Path) -> Path:
    out = folder / "report.html"
    write_report([read_run(run) for run in runs], out)
    return out


def pictured(tab: Tab, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    tab.page.screenshot(path=path, full_page=True)
    print(f"screenshot: {path}")


def test_every_plot_is_drawn_from_a_file_without_a_complaint(tab: Tab, tmp_path: Path) -> None:
    page = made(tmp_path, write_run(tmp_path / "run", MadeUp(turns=3, metrics={"my/own": 3.0})))
    tab.open(page.as_uri())
    plots, drawn = tab.counted_plots()
    assert plots == drawn > 20
    assert tab.page.locator("figure h3", has_text="my/own").count() == 1
    assert tab.complaints == []
    assert tab.requests == [page.as_uri()]
    pictured(tab, "episodes")


def test_it_works_under_a_server_as_strict_as_itself(tab: Tab, tmp_path: Path) -> None:
    page = made(tmp_path, write_run(tmp_path / "run"))
    with served(tmp_path, policy_of(page)) as address:
        tab.open(f"{address}/report.html")
        plots, drawn = tab.counted_plots()
        for plot in tab.page.locator(".plot").all():
            plot.locator(".nsewdrag").hover()
            plot.locator(".hoverlayer text").first.wait_for()
            buttons = plot.locator(".modebar-btn").evaluate_all("all => all.map(one => one.dataset.title)")
            assert buttons == ["Download plot as a PNG", "Reset axes"]
        with tab.page.expect_download() as download:
            tab.page.locator(".modebar-btn").nth(-2).click()
    assert plots == drawn > 15
    assert download.value.suggested_filename.endswith(".png")
    assert tab.complaints == []
    assert [address for address in tab.requests if not address.startswith("blob:")] == tab.requests[:1]


def test_what_a_run_says_stays_text_wherever_it_stands(tab: Tab, tmp_path: Path) -> None:
    made_up = MadeUp(
        prompt=ATTACK,
        text=ATTACK,
        rewards=(ATTACK, "brief"),
        extras={ATTACK: ATTACK},
        metrics={ATTACK: 1.0},
        recipe={"model": {"name": ATTACK}},
    )
    # A folder's name has no slash.
    name = ATTACK.replace("/", "∕")
    page = made(tmp_path, write_run(tmp_path / name, made_up), write_run(tmp_path / "b" / name, made_up))
    tab.open(page.as_uri())
    assert tab.complaints == []
    assert tab.page.locator("img").count() == 0
    assert tab.page.locator(".completion .said").first.text_content() == ATTACK
    assert tab.page.locator(".prompt .said").first.text_content() == ATTACK
    assert tab.page.locator(".extras dd").first.text_content() == ATTACK
    assert tab.page.locator(".rewards dt").first.text_content() == ATTACK
    assert "<script>alert(1)</script>" in tab.page.locator(".settings dd").first.text_content()
    assert tab.page.locator("figure h3").get_by_text(ATTACK, exact=True).count() > 0
    plots, drawn = tab.counted_plots()
    assert plots == drawn
    tab.page.locator(".plot .nsewdrag").first.hover()
    tab.page.locator(".hoverlayer text").first.wait_for()
    assert "<script>alert(1)<∕script>" in "".join(tab.page.locator(".hoverlayer text").all_text_contents())
    for view in ("log-probability", "ratio"):
        tab.page.locator(".views span", has_text=view).click()
        assert tab.page.locator(".tokens span").first.text_content() == ATTACK
    tab.page.locator(".views span", has_text="text").click()
    tab.page.locator("#search").fill("<script>")
    assert tab.page.locator("mark").first.text_content() == "<script>"
    assert tab.complaints == []


def test_runs_lie_over_each_other_and_can_be_hidden(tab: Tab, tmp_path: Path) -> None:
    second = MadeUp(seed=1, recipe={"loss": {"beta": 0.5}})
    runs = write_run(tmp_path / "first", MadeUp(has_tokens=False)), write_run(tmp_path / "second", second)
    tab.open(made(tmp_path, *runs).as_uri())
    figure = tab.page.locator("figure", has=tab.page.locator("h3", has_text="KL"))
    assert figure.locator("path.js-line").count() == 2
    assert len(set(figure.locator("path.js-line").evaluate_all("all => all.map(one => one.style.stroke)"))) == 2
    assert "loss.beta" in tab.page.locator("#recipe table").text_content()
    assert tab.page.locator("h3", has_text="Time by phase: ").all_text_contents() == [
        "Time by phase: first",
        "Time by phase: second",
    ]
    pictured(tab, "two-runs")
    tab.page.locator("#legend button", has_text="second").click()
    figure.locator("path.js-line").nth(1).wait_for(state="detached")
    assert figure.locator("path.js-line").count() == 1
    assert tab.page.locator("input[value=ratios]").is_disabled()
    tab.page.locator("#run").select_option("1")
    assert tab.page.locator("input[value=ratios]").is_enabled()
    assert tab.complaints == []


def test_completions_are_chosen_searched_and_filtered(tab: Tab, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", MadeUp(prompts=3, extras={"parsed": "7"}))
    tab.open(made(tmp_path, run).as_uri())
    page = tab.page
    assert page.locator(".completion").count() == 4
    assert "Step 20" in page.locator(".status").text_content()
    page.locator("#step").fill("0")
    page.locator("#group").select_option("1")
    assert page.locator(".status").text_content() == "Step 1, group 1"
    stored = read_run(run).completions(1)[4:8]
    shown = page.locator(".completion .said").all_text_contents()
    assert sorted(shown) == sorted(one.text for one in stored)

    page.locator("#reward-from").fill("1.5")
    every = [one for step in range(1, 21) for one in read_run(run).completions(step)]
    good = [one for one in every if sum(one.rewards.values()) >= 1.5]
    assert page.locator(".status").text_content().startswith(f"{len(good)} of the {len(every)} completions")
    page.locator("#advantage-to").fill("0.5")
    both = [one for one in good if one.advantage <= 0.5]
    assert page.locator(".status").text_content().startswith(f"{len(both)} of the")
    page.get_by_role("button", name="clear").click()
    page.locator("#search").fill(good[0].text.upper())
    assert page.locator(".completion mark").first.text_content() == good[0].text
    page.locator(".completion header button").first.click()
    assert page.locator(".status").text_content() == f"Step {good[0].step}, group {good[0].group}"
    assert tab.complaints == []


def test_tokens_are_shaded_by_what_is_chosen_and_say_their_values(tab: Tab, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", MadeUp(steps=1, prompts=1))
    tab.open(made(tmp_path, run).as_uri())
    best = max(read_run(run).completions(1), key=lambda one: sum(one.rewards.values()))
    tab.page.locator(".views span", has_text="log-probability").click()
    token = tab.page.locator(".completion").first.locator(".tokens span").first
    assert token.text_content() == best.token_texts[0]
    assert f"log-probability {best.logprobs[0]:.2f}" in token.get_attribute("title")
    shade = token.evaluate("one => one.style.backgroundColor")
    assert shade.startswith("rgb")
    pictured(tab, "tokens")
    tab.page.locator(".views span", has_text="ratio").click()
    token = tab.page.locator(".completion").first.locator(".tokens span").first
    assert token.evaluate("one => one.style.backgroundColor") != shade
    assert tab.complaints == []


def test_turns_and_tool_calls_are_folded(tab: Tab, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", MadeUp(steps=1, turns=2, tokens=80))
    tab.open(made(tmp_path, run).as_uri())
    card = tab.page.locator(".completion").first
    assert card.locator("details.turn > summary").all_text_contents() == ["assistant", "tool add", "assistant"]
    assert not card.locator("details.call > .said").is_visible()
    card.locator("details.call > summary").click()
    assert '"name": "add"' in card.locator("details.call > .said").text_content()
    assert tab.complaints == []


def test_it_is_readable_in_the_dark_and_on_a_narrow_screen(browser: Any, tmp_path: Path) -> None:
    page = made(tmp_path, write_run(tmp_path / "run"))
    for scheme, width in (("dark", 1400), ("light", 420)):
        tab = Tab(browser, scheme=scheme, width=width)
        tab.open(page.as_uri())
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.complaints == []
        pictured(tab, f"{scheme}-{width}")
        tab.page.close()


def test_ten_thousand_steps_of_64_completions_fit_in_30_mb(tab: Tab, tmp_path: Path) -> None:
    long = MadeUp(steps=10_000, prompts=8, group_size=8, tokens=600, distinct_files=40)
    page = made(tmp_path, write_run(tmp_path / "run", long))
    assert page.stat().st_size < 30_000_000
    tab.open(page.as_uri())
    plots, drawn = tab.counted_plots()
    assert plots == drawn > 15
    assert "40 of 10000 stored steps" in tab.page.locator("#left-out").text_content()
    assert tab.complaints == []
