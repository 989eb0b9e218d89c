"""Takes the pictures of the app's three pages that are in docs/app.md, with the first two checkpoints of a folder:

    python -m reproduce.app_pictures results [OUT]

Needs gradio, playwright and Chromium (docs/app.md). OUT is reproduce/results unless given.
"""

import io
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import app
from machine.files import whole_file

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def take(page, name, out):
    """Saves what the page shows as a PNG of 256 colours, which are enough and take a third of the bytes."""
    time.sleep(2)  # waits for animations to end
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as shot:
        shown = shot.convert("RGB").quantize(256)
    with whole_file(out / f"app-{name}.png", "picture") as file:
        shown.save(file, format="png", optimize=True)


def main(folder, out="reproduce/results"):
    served, address = app.serve([folder], torch.device("cpu"), "127.0.0.1", 0)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.goto(address)
        page.locator("#after img").wait_for()
        take(page, "operator", Path(out))
        for tab, button, last in (("samples", "#draw", "50 calls"), ("two models", "#draw-both", "The pictures differ by")):
            page.get_by_role("tab", name=tab).click()
            page.get_by_text("million parameters").wait_for(state="attached")
            page.locator(button).click()
            page.get_by_text(last).wait_for(timeout=300_000)
            take(page, tab.replace(" ", "-"), Path(out))
        browser.close()
    served.close(verbose=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
