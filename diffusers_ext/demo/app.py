"""The page of the demo, by gradio: fields, and which function of the studio each button calls.

gradio is an extra of the package: `pip install 'diffusers_ext[demo]'`.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.demo.settings import AS_SAVED, MAX_IMAGES, Settings
from diffusers_ext.demo.studio import MAX_BETWEEN, Made, ShownStep, Studio


def build(pipe: DiffusionPipeline, title: str) -> gr.Blocks:
    """The page for a pipeline; `launch()` serves it."""
    return build_page(Studio(pipe), title)


def build_page(studio: Studio, title: str) -> gr.Blocks:
    """The page for a studio."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown("## Diffusion demo")
        gr.Textbox(title, label="pipeline", interactive=False, max_lines=1)
        with gr.Tab("generate"), gr.Row():
            for name in ("A", "B"):  # two settings side by side
                with gr.Column():
                    fields = _fields(studio)
                    _made(studio.generate, fields, [], f"generate {name}")
        if studio.is_of_images:
            with gr.Tab("from an image"), gr.Row():
                with gr.Column():
                    image = gr.Image(type="pil", image_mode="RGBA", label="picture to begin with")
                    strength = gr.Slider(
                        0, 1, 0.6, label="strength", info="0 keeps the picture, 1 does not look at it"
                    )
                    fields = _fields(studio)
                with gr.Column():
                    _made(studio.from_image, fields, [image, strength], "make from the image")
            with gr.Tab("inpaint"), gr.Row():
                with gr.Column():
                    editor = gr.ImageEditor(type="pil", image_mode="RGBA", label="paint over what is to be made anew")
                    fields = _fields(studio)
                with gr.Column():
                    _made(_inpainting(studio), fields, [editor], "inpaint")
        with gr.Tab("interpolate"), gr.Row():
            with gr.Column():
                other = gr.Number(1, label="other seed", precision=0)
                count = gr.Slider(2, MAX_BETWEEN, 8, step=1, label="images from seed to seed")
                fields = _fields(studio)
            with gr.Column():
                gallery = _gallery("on the way")
                button = gr.Button("interpolate", variant="primary")
                button.click(_asked(studio.interpolate), [*fields, other, count], gallery)
    return page


def _fields(studio: Studio) -> list[gr.components.Component]:
    """Fields in the order of `Settings`."""
    labels = gr.Dropdown(
        studio.labels or [],
        multiselect=True,
        label="labels",
        info="in turn; none for images without a label",
        visible=studio.labels is not None,
    )
    prompt = gr.Textbox(label="prompt", visible=studio.takes_prompts)
    with gr.Row():
        count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="images")
        seed = gr.Number(0, label="seed", precision=0)
    with gr.Row():
        scheduler = gr.Dropdown(studio.schedulers, value=AS_SAVED, label="scheduler")
        steps = gr.Number(min(50, studio.default_steps), label="steps", precision=0)
    with gr.Accordion("guidance", open=studio.labels is not None or studio.takes_prompts):
        default_scale, default_start, default_stop = studio.default_guidance
        scale = gr.Number(default_scale, label="guidance scale", info="1 is none")
        with gr.Row():
            start = gr.Slider(0, 1, default_start, label="from", info="fraction of the steps")
            stop = gr.Slider(0, 1, default_stop, label="to")
    return [labels, prompt, count, scheduler, steps, scale, start, stop, seed]


def _made(work: Callable[..., Made], fields: list, more: list, name: str) -> None:
    """A button, the images that it makes, and a slider over the steps to them."""
    button = gr.Button(name, variant="primary")
    gallery = _gallery("images")
    steps = gr.State([])
    slider = gr.Slider(1, 2, 1, step=1, label="step", visible=False)
    head = gr.Markdown()
    picture = gr.Image(label="step", show_label=False, visible=False, interactive=False)

    def make(*values: Any):
        made = _asked(work)(*values)
        last = len(made.steps)
        shown = gr.Slider(1, max(2, last), last, step=1, visible=last > 1)
        return made.images, made.steps, shown, *_shown(made.steps, last)

    button.click(make, [*fields, *more], [gallery, steps, slider, head, picture])
    slider.change(_shown, [steps, slider], [head, picture], show_progress="hidden")


def _gallery(label: str) -> gr.Gallery:
    return gr.Gallery(label=label, columns=4, height="auto", object_fit="contain")


def _shown(steps: list[ShownStep], number: float) -> tuple[str, gr.Image]:
    """A step with its head; nothing where there was none, as with a picture that is kept as it is."""
    if not steps:
        return "", gr.Image(visible=False)
    step = steps[min(len(steps), max(1, int(number))) - 1]
    return f"x_t above the predicted x_0, {step.head}", gr.Image(step.picture, visible=True)


def _asked(work: Callable) -> Callable:
    """A function of the studio as a button calls it: fields first, and errors of the user as messages on the page."""

    def call(*values: Any):
        fields, more = values[:9], values[9:]
        try:
            return work(Settings(*fields), *more)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def _inpainting(studio: Studio) -> Callable[[Settings, dict | None], Made]:
    def inpaint(settings: Settings, painted: dict[str, Any] | None) -> Made:
        painted = painted or {"background": None, "layers": []}
        background: Image.Image | None = painted["background"]
        return studio.inpaint(settings, background, painted["layers"])

    return inpaint
