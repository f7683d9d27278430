"""A real browser for tests: headless Chromium, driven by Playwright."""

import contextlib
import os
import shutil

import pytest


@contextlib.contextmanager
def browser_page(width=1280, height=800):
  """A fresh page and the list of what went wrong on it: errors of scripts and of the console.

  Skips the test where Playwright or Chromium is missing. CHROMIUM names another executable.
  """
  api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
  executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
  if not executable:
    pytest.skip("no chromium: install it, or name it in CHROMIUM")
  with api.sync_playwright() as playwright:
    # WebGL without a graphics card: rendered by the processor.
    arguments = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = playwright.chromium.launch(executable_path=executable, args=arguments)
    try:
      page = browser.new_page(
        viewport={"width": width, "height": height}, accept_downloads=True
      )
      wrong = []
      page.on("pageerror", lambda error: wrong.append(str(error)))
      page.on(
        "console",
        lambda line: wrong.append(line.text) if line.type == "error" else None,
      )
      yield page, wrong
    finally:
      browser.close()
