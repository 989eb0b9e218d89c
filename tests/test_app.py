"""app.py in a real browser, and how it begins."""

import io
import re
import shlex
import shutil
import socket
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import app
import sample
from checkpoints.build import save_checkpoint
from commands import ROOT, error_of
from machine.processes import ALONE
from models import MODELS
from pages.operator import chosen, evolve, picture, to_show
from pde_ssm import TERMS

QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
NAMES = ["daisy", "rose", "sunflower"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, randomize):
    """A folder with checkpoints of two small models whose classes have names."""
    folder = tmp_path_factory.mktemp("models")
    for mixer in ("attention", "pdessm"):
        torch.manual_seed(1)
        model = randomize(MODELS["DiT-N/4"](input_size=8, in_channels=3, num_classes=3, learn_sigma=True, mixer=mixer))
        args = dict(model="DiT-N/4", mixer=mixer, vae="none", num_classes=3, image_size=8, class_names=NAMES)
        save_checkpoint(folder / f"{mixer}.pt", model=model.state_dict(), args=args | dict(objective="diffusion"))
    return folder


@contextmanager
def browser():
    """A new page of a browser that keeps nothing."""
    pytest.importorskip("playwright", reason="the browser is driven by playwright")
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium, which Debian has as a package of this name")
    with sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in QUIET.split()])
        page = window.new_page(viewport=dict(width=1440, height=900))
        page.set_default_timeout(60_000)
        yield page
        window.close()


@pytest.fixture(scope="module")
def page(folder):
    """The app in a browser; page.hosts are those that it talked to."""
    pytest.importorskip("gradio", reason="gradio is what the app is made of")
    with browser() as page:
        served, address = app.serve([str(folder)], torch.device("cpu"), "127.0.0.1", 0)
        page.hosts, page.address = set(), address
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.locator("#after img").wait_for()
        yield page
        served.close(verbose=False)


def pixels_of(page, name):
    """The pixels of the picture that the page shows there."""
    with Image.open(io.BytesIO(page.request.get(page.locator(f"#{name} img").get_attribute("src")).body())) as image:
        return np.asarray(image.convert("RGB"))


def wait_for_another(page, name, shown):
    """Waits until a picture has another address."""
    page.wait_for_function("([name, shown]) => document.querySelector(`#${name} img`)?.src != shown", arg=[name, shown])


def sentence_of(page):
    """What the page says of a mistake, which is taken away afterwards."""
    text = page.get_by_test_id("toast-text").inner_text()
    page.get_by_test_id("toast-close").click()
    page.get_by_test_id("toast-text").wait_for(state="detached")
    return text


def test_a_slider_changes_the_picture(page):
    sliders = [0.12, 0.03, 30, -0.1, 0.05, -0.2, 1]
    first = page.locator("#after img").get_attribute("src")
    np.testing.assert_array_equal(pixels_of(page, "after"), to_show(evolve(picture(None, 128), *chosen(*sliders, TERMS))[1]))
    page.locator("#tau input[type=range]").press("ArrowRight")
    wait_for_another(page, "after", first)
    sliders[-1] = 1.05
    np.testing.assert_array_equal(pixels_of(page, "after"), to_show(evolve(picture(None, 128), *chosen(*sliders, TERMS))[1]))


def test_a_picture_that_is_dropped_is_shown_and_what_is_none_ends_in_a_sentence(page, tmp_path):
    shown = page.locator("#before img").get_attribute("src")
    (tmp_path / "notes.png").write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "notes.png")
    assert sentence_of(page) == "cannot read the image notes.png (it is of no known format)"
    page.locator("#picture").get_by_label("Clear").click()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "flat.png")
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "flat.png")
    wait_for_another(page, "before", shown)
    assert (pixels_of(page, "before") == (200, 100, 50)).all()


def test_samples_are_those_of_the_command(page, tmp_path):
    page.get_by_role("tab", name="samples").click()
    classes = page.locator("#classes input")
    page.get_by_text("3 classes").wait_for()
    classes.fill("sunflowr")
    classes.press("Enter")
    page.locator("#draw").click()
    assert sentence_of(page) == "the checkpoint has no class 'sunflowr'; the nearest are sunflower"
    classes.press("Backspace")
    page.locator("#draw").click()
    page.get_by_text("50 calls of the network").wait_for()
    command = page.locator("#command textarea").input_value()
    sample.main(sample.parse_args([*shlex.split(command)[2:], "--device", "cpu", "--out", str(tmp_path / "a.png")]), ALONE)
    with Image.open(tmp_path / "a.png") as drawn:
        np.testing.assert_array_equal(pixels_of(page, "samples"), np.asarray(drawn))


def test_two_models_are_shown_beside_each_other(page):
    page.get_by_role("tab", name="two models").click()
    page.locator("#draw-both").click()
    page.get_by_text("The pictures differ by").wait_for()
    left, right, apart = (pixels_of(page, name) for name in ("left", "right", "apart"))
    assert left.shape == right.shape == apart.shape
    assert (left != right).any()


def test_the_page_talks_to_this_machine_alone_and_hands_out_no_files(page, folder):
    assert page.hosts == {page.address.removeprefix("http://")}
    for path in (folder / "pdessm.pt", app.__file__, "/etc/hostname"):
        assert page.request.get(f"{page.address}/gradio_api/file={path}").status == 403


@pytest.mark.parametrize("sent", [False, True])
def test_a_picture_that_was_not_uploaded_is_not_read(page, sent):
    outside = dict(path=str(ROOT / "reproduce" / "results" / "digits.png"), meta={"_type": "gradio.FileData"}) if sent else None
    asked = dict(fn_index=0, session_hash=f"sent {sent}", data=[outside, 16, 0.1, 0.1, 0, 0, 0, 0, 1, []])
    page.request.post(f"{page.address}/gradio_api/queue/join", data=asked)
    answer = page.request.get(f"{page.address}/gradio_api/queue/data", params=dict(session_hash=f"sent {sent}")).text()
    assert f'"success":{"false" if sent else "true"}' in answer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folders", "nowhere"], "--folders nowhere: there is no such folder"),
        (["--port", "TAKEN"], "of 127.0.0.1 is in use or cannot be had .*--port takes another"),
        (["--port", "70000"], "port 70000 of 127.0.0.1 is in use or cannot be had"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, flags, message):
    pytest.importorskip("gradio", reason="gradio is what the app is made of")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        flags = [str(server.getsockname()[1]) if flag == "TAKEN" else flag for flag in flags]
        assert re.search(message, error_of(app, *flags))


def test_without_gradio_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install -r requirements-app.txt" in error_of(app)
    assert capsys.readouterr().out.startswith("There is no checkpoint in pretrained or results: train one")
