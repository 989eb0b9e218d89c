"""Takes the pictures of the app's three pages that are in docs/app.md, with the first two checkpoints of a folder:

    python -m reproduce.app_pictures results [OUT]

Needs gradio, playwright and Chromium (docs/app.md). OUT is reproduce/results unless given.
"""

import argparse
import io
import shutil
import time
from pathlib import Path

import torch
from PIL import Image

import app
from machine.files import whole_file
from machine.processes import launch
from pages.checkpoints import checkpoints_in

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def take(page, name, out):
    """Saves what the page shows as a PNG of 256 colours, which are enough and take a third of the bytes."""
    time.sleep(2)  # waits for animations to end
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as shot:
        shown = shot.convert("RGB").quantize(256)
    with whole_file(out / f"app-{name}.png", "picture") as file:
        shown.save(file, format="png", optimize=True)


def main(folder, out):
    if (found := len(checkpoints_in([folder]))) < 2:
        raise ValueError(f"{folder} has {found} checkpoints, and the pictures are of two: give a folder such as pretrained")
    if not out.is_dir():
        raise ValueError(f"{out}: there is no such folder for the pictures")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ValueError("the pictures need playwright: pip install -r requirements-app.txt") from error
    if not (chromium := shutil.which("chromium")):
        raise ValueError("the pictures need Chromium, and there is no command chromium: apt-get install chromium")
    served, address = app.serve([folder], torch.device("cpu"), "127.0.0.1", 0)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.goto(address)
        page.locator("#after img").wait_for()
        take(page, "operator", out)
        for tab, button, last in (("samples", "#draw", "50 calls"), ("two models", "#draw-both", "The pictures differ by")):
            page.get_by_role("tab", name=tab).click()
            page.get_by_text("million parameters").wait_for(state="attached")
            page.locator(button).click()
            page.get_by_text(last).wait_for(timeout=300_000)
            take(page, tab.replace(" ", "-"), out)
        browser.close()
    served.close(verbose=False)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("out", type=Path, nargs="?", default=Path("reproduce/results"), metavar="OUT")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
