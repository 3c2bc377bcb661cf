"""The page of the demo as a person uses it, in headless Chromium; skipped where gradio, playwright or Chromium is missing."""

import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import diffusers_ext
from diffusers_ext.demo.settings import Settings
from diffusers_ext.demo.studio import Studio


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="takes Chromium")
PATIENCE = 120_000  # milliseconds, on a machine that does other work
SETTLING = 1_000  # milliseconds that the canvas has for a picture or a stroke, of which it gives no sign


@pytest.fixture(scope="module")
def page():
    from diffusers_ext.demo.app import build_page

    app = build_page(Studio(diffusers_ext.example("digits")), "digits")
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with sync_api.sync_playwright() as playwright:
        # gradio asks other machines for fonts, which there may be no way to.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1500})
        page.set_default_timeout(PATIENCE)
        page.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.abort())
        page.goto(address, wait_until="domcontentloaded")
        page.get_by_role("button", name="generate A").wait_for()
        yield page
        browser.close()
    app.close()


SHOWN_IMAGES = ".grid-wrap img, .gallery-item img, button.thumbnail-item img"


def shown_step(page):
    return page.get_by_text(re.compile(r"predicted x_0, t = ")).first


def test_images_are_made_and_the_slider_goes_through_their_steps(page, tmp_path):
    page.get_by_label("steps", exact=True).first.fill("4")
    page.get_by_role("button", name="generate A").click()
    shown_step(page).wait_for()
    last = shown_step(page).inner_text()
    slider = page.get_by_label(re.compile("step$")).and_(page.locator("input[type=number]")).first
    slider.fill("1")
    slider.press("Enter")
    page.get_by_text("predicted x_0, t = 999").first.wait_for()
    assert last != shown_step(page).inner_text()
    assert page.locator(SHOWN_IMAGES).count() >= 4
    page.screenshot(path=tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").convert("L").getextrema() != (255, 255)


def test_a_bad_value_shows_a_message(page):
    page.get_by_label("steps", exact=True).first.fill("0")
    page.get_by_role("button", name="generate A").click()
    page.get_by_text("The number of steps must be a whole number from 1 to 1000, got 0.").wait_for()


def test_what_the_brush_paints_is_made_anew_and_the_rest_is_kept(page, tmp_path):
    Image.new("RGB", (160, 160), (128, 128, 128)).save(tmp_path / "grey.png")
    page.get_by_role("tab", name="inpaint").click()
    button = page.get_by_role("button", name="inpaint", exact=True)
    panel = page.get_by_role("tabpanel").filter(has=button)
    panel.get_by_label(re.compile("images$")).and_(page.locator("input[type=number]")).fill("1")
    panel.get_by_label("steps", exact=True).fill("4")
    button.click()
    page.get_by_text("Give a picture to paint over.").wait_for()
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "grey.png")
    panel.get_by_label("Brush", exact=True).wait_for()
    page.wait_for_timeout(SETTLING)
    box = panel.locator("canvas").first.bounding_box()
    middle, height = box["x"] + box["width"] / 2, box["height"]  # the picture is there, and takes 0.83 of the height
    for share in (-0.32, -0.2):  # two strokes of 0.26 of the height, downwards, in the left part of the picture
        page.mouse.move(middle + share * height, box["y"] + 0.18 * height)
        page.mouse.down()
        page.mouse.move(middle + share * height, box["y"] + 0.82 * height, steps=10)
        page.mouse.up()
        page.wait_for_timeout(SETTLING)
    button.click()
    made = panel.locator(SHOWN_IMAGES).first
    made.wait_for()
    page.screenshot(path=tmp_path / "inpainted.png")
    made = Image.open(io.BytesIO(page.request.get(made.get_attribute("src")).body())).convert("L")
    pixels = np.asarray(made.resize((8, 8), Image.Resampling.BOX), dtype=int)
    assert np.abs(pixels[:, 5:] - 128).max() <= 2 and np.abs(pixels[:, :2] - 128).max() > 30


def test_what_the_brush_painted_reaches_the_studio():
    from diffusers_ext.demo.app import _inpainting

    studio = Studio(diffusers_ext.example("digits"))
    picture, layer = Image.new("RGBA", (80, 80), (128, 128, 128, 255)), Image.new("RGBA", (80, 80))
    layer.paste((255, 0, 0, 255), (0, 0, 40, 80))
    settings = Settings(num_images=1, num_steps=2)
    made = _inpainting(studio)(settings, {"background": picture, "layers": [layer], "composite": picture})
    assert np.abs(np.asarray(made.images[0], dtype=int)[:, 64:] - 128).max() <= 1
    with pytest.raises(ValueError, match="Give a picture to paint over"):
        _inpainting(studio)(settings, None)
