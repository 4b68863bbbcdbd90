"""What tests do with a real browser, which the fixture `browser` of conftest.py gives them."""

import json
import shutil
import time

import pytest

_FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb""".split()
_FLAGS += ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]  # WebGPU by software
_FLAGS.append("--host-resolver-rules=MAP insecure.test 127.0.0.1")  # a host that is not trusted without https


def start_chromium(profile):
    """A Chromium under selenium, for a with block. The test skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chromium.set_script_timeout(120)
    return chromium


def emulate(browser, width=1200, height=1400, **features):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def find(browser, selector, number=0):
    return browser.find_elements("css selector", selector)[number]


def wait_for(browser, condition, seconds=180):
    """Wait until a JavaScript expression is true, and return its value."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        value = browser.execute_script(f"return {condition}")
        if value:
            return value
        time.sleep(0.05)
    shown = browser.execute_script("return document.body.innerText")
    raise AssertionError(f"{condition} did not come; the page shows: {shown}")


def settle(browser, milliseconds=350):
    """Wait until a fade is over, and drawn."""
    browser.execute_async_script(
        "const done = arguments[1]; setTimeout(() => requestAnimationFrame(() => done()), arguments[0])", milliseconds
    )


def hover(browser, element):
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).perform()
    settle(browser)


def press(browser, *keys):
    from selenium.webdriver import ActionChains, Keys

    for key in keys:
        ActionChains(browser).send_keys(getattr(Keys, key)).perform()
    settle(browser)


def touch(browser, element):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    actions = ActionBuilder(browser, mouse=PointerInput("touch", "finger"))
    actions.pointer_action.move_to(element).pointer_down().pointer_up()
    actions.perform()
    settle(browser)


def requested(browser):
    """The addresses that were requested since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
