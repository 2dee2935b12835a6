"""Debian's Chromium, headless, driven through selenium: what a page asks for, complains of and looks like."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

_PROGRAMS = ("chromium", "chromedriver")


class Browser:
    """One window of Chromium."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        options = Options()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument(f"--window-size={width},{height}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def all(self, css: str) -> list[Any]:
        """Return the elements of a selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what a key or a click brings about: the driver does not wait for a page that a script asks for."""
        WebDriverWait(
            self.driver, 30, 0.05, ignored_exceptions=[StaleElementReferenceException, JavascriptException]
        ).until(lambda _: self._is_loaded() and condition())

    def _is_loaded(self) -> bool:
        return self.driver.execute_script("return document.readyState") == "complete"

    def press(self, *keys: str) -> None:
        """Type into what has the focus, once the page and its script are there."""
        for key in keys:
            self.until(lambda: True)
            self.driver.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def click(self, css: str) -> None:
        """Follow the first element of a selector, scrolled into sight."""
        element = self.all(css)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def emulate(self, **features: str) -> None:
        """Set media features, such as ``prefers_color_scheme="dark"``."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def requests(self) -> list[str]:
        """Return every address that was asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def console_messages(self) -> list[str]:
        """Return what the browser wrote to its console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def serious_faults(self, *rules: str) -> list[str]:
        """Return what axe calls serious or critical on the page, by these rules or by all: rule, and the elements."""
        self.driver.execute_script(
            files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
        )
        script = "axe.run(document, arguments[0]).then(arguments[1])"
        report = self.driver.execute_async_script(script, {"runOnly": list(rules)} if rules else {})
        return [
            f"{fault['id']}: {[node['html'][:120] for node in fault['nodes'][:3]]}"
            for fault in report["violations"]
            if fault["impact"] in ("serious", "critical")
        ]

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG, once its images are there."""
        shown = "Array.from(document.images).filter(one => one.getBoundingClientRect().top < innerHeight)"
        WebDriverWait(self.driver, 30).until(
            lambda driver: driver.execute_script(f"return {shown}.every(one => one.complete)")
        )
        self.driver.save_screenshot(str(path))


def require_browser() -> None:
    """Skip the test, by name, where there is no browser; fail where one was promised (CI)."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing and not os.environ.get("CAPFILT_BROWSER_REQUIRED"):
        pytest.skip(f"no {' and '.join(missing)} on this machine: apt-get install chromium chromium-driver")
    assert not missing, missing
