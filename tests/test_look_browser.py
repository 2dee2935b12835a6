"""The page of ``capfilt look`` in a browser: from the first screen to a sample and back, with keys and without script.

``python -m tests.test_look_browser CORPUS`` writes the screenshots of docs/look.md anew.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.look.page import overview_file
from jobs.look.snapshot import Snapshot
from pipeline.manifest.manifest import Manifest
from tests.browser import Browser, require_browser
from tests.corpora import Corpus, make_corpus
from tests.pages import Site, looking

pytestmark = pytest.mark.slow
SHOTS = Path(__file__).resolve().parent.parent / "docs" / "look"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require_browser()
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(str(tmp_path_factory.mktemp("browser") / "corpus"), shards=2, images=96, places=True)


@pytest.fixture(scope="module")
def site(corpus: Corpus) -> Iterator[Site]:
    with looking(corpus.root) as site:
        yield site


def test_from_the_first_screen_to_a_sample_and_back(browser: Browser, site: Site) -> None:
    def is_at(*parts: str) -> bool:
        return all(part in browser.driver.current_url for part in parts)

    browser.requests()
    browser.console_messages()
    browser.driver.get(site.address)
    assert browser.all(".thumb img") and all(image.size["width"] > 0 for image in browser.all(".thumb img"))
    browser.click(".row h3 a")
    browser.until(lambda: is_at("sort=random") and len(browser.all(".card")) == 60)
    browser.driver.back()
    browser.until(lambda: browser.driver.current_url == site.address)
    browser.click(".columns a")
    browser.until(lambda: is_at("..") and browser.all(".card"))
    browser.press("/")
    browser.press(*"caption", "ENTER")
    browser.until(lambda: is_at("words=caption"))
    browser.click("a[rel=next]")
    browser.until(lambda: is_at("page=2"))
    second = browser.driver.current_url
    browser.press("j", "j", "k", "ENTER")
    browser.until(lambda: is_at("/sample/") and browser.all("figure img")[0].size["width"] > 0)
    browser.press("u")
    browser.until(lambda: browser.driver.current_url == second)
    browser.press("p")
    browser.until(lambda: not is_at("page="))
    browser.press("j", "j", "x")
    browser.until(lambda: "drop" in "".join(marked.text for marked in browser.all(".marked")))
    assert len(browser.all(".marked")) == 1 and not is_at("page=")
    browser.press("x")
    browser.until(lambda: not browser.all(".marked"))
    assert len(browser.all(".card")) == 60
    asked = browser.requests()
    assert len(asked) > 60 and [address for address in asked if not address.startswith(site.address)] == []
    assert browser.console_messages() == []


# Of the second scheme only colours differ.
@pytest.mark.parametrize(("scheme", "rules"), [("light", ()), ("dark", ("color-contrast",))])
def test_axe_finds_nothing_serious(browser: Browser, site: Site, scheme: str, rules: tuple[str, ...]) -> None:
    browser.emulate(prefers_color_scheme=scheme)
    uid = site.page("grid?status=kept").links()
    sample = next(link for link in uid if "/sample/" in link).rpartition("/")[2]
    for path in ("", "grid", "grid?image=no", "runs", "selection?min_score=0.3", f"sample/{sample}"):
        browser.driver.get(site.address + path)
        assert browser.serious_faults(*rules) == [], path


def test_the_slider_shows_another_selection(browser: Browser, site: Site) -> None:
    browser.driver.get(site.address + "selection")
    browser.all("#min_score")[0].click()
    browser.until(lambda: "min_score=" in browser.driver.current_url)
    value = browser.all("#min_score")[0].get_attribute("value")
    assert browser.all("output")[0].text == value and "Just kept" in browser.driver.page_source


def test_reading_works_without_script(browser: Browser, site: Site) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get(site.address)
        browser.click(".funnel a")
        browser.click("a[rel=next]")
        browser.click("a.open")
        browser.until(lambda: "/sample/" in browser.driver.current_url)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_nothing_is_wider_than_a_telephone(browser: Browser, site: Site) -> None:
    browser.driver.set_window_size(500, 900)
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for path in ("", "grid", "runs", "selection"):
        browser.driver.get(site.address + path)
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 400, path
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.driver.set_window_size(1280, 900)


def test_the_file_is_whole_without_network_and_script(
    browser: Browser, corpus: Corpus, tmp_path: Path
) -> None:
    file = tmp_path / "corpus.html"
    file.write_text(overview_file(Snapshot(Manifest(corpus.storage)), corpus.root, images=96))
    browser.requests()
    browser.driver.get(file.as_uri())
    loaded = browser.driver.execute_script(
        "return [...document.images].filter((image) => image.naturalWidth > 0).length"
    )
    assert loaded == len(browser.all("img")) > 40
    colour = browser.driver.execute_script("return getComputedStyle(document.querySelector('.bar')).height")
    assert colour != "auto"
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [file.as_uri()]


def write_screenshots(root: str) -> None:
    """Write the pictures of docs/look.md from a corpus."""
    SHOTS.mkdir(exist_ok=True)
    browser = Browser(1280, 1000)
    with looking(root) as site:
        for name, path, scheme in (
            ("overview", "", "light"),
            ("grid", "grid?score=..&sort=score", "light"),
            ("failures", "grid?image=no", "dark"),
        ):
            browser.emulate(prefers_color_scheme=scheme)
            browser.driver.get(site.address + path)
            browser.screenshot(SHOTS / f"{name}.png")
    browser.driver.quit()


if __name__ == "__main__":
    write_screenshots(sys.argv[1])
