"""What is said of measures, in lines and in cards."""

from diffusers_ext.evaluation.report import describe, figures_of


SAMPLING = {
    "scheduler_class": "ExtDDIMScheduler",
    "num_inference_steps": 5,
    "guidance_scale": 4.5,
    "guidance_interval": {"sigma": [0.2, 5.0]},
    "internal_guidance_scale": 1.0,
    "guider": None,
    "labels": None,
    "captions": None,
}
RESULT = {
    "dataset_name": "path/to/digits",
    "features": None,
    "num_neighbours": 5,
    "image_shape": [1, 8, 8],
    "seeds": [3, 4],
    "sampling": SAMPLING,
    "generated": {"num_images": 10, "pixel_precision": 0.5},
    "spread": {"pixel_precision": 0.1},
}


def test_a_row_of_a_card_says_where_a_call_is_guided():
    for interval, words in (
        ({"sigma": [0.2, 5.0]}, " in sigma 0.2 to 5"),
        ((0.0, 0.5), " in steps 0 to 0.5"),
        (None, ""),
    ):
        figures = figures_of(RESULT | {"sampling": SAMPLING | {"guidance_interval": interval}}, "command")
        assert [figure.sampler for figure in figures] == [f"ExtDDIMScheduler, guidance 4.5{words}"]


def test_what_is_measured_once_beside_several_sets_is_named():
    conditioned = {"condition": "lowres:2", "held_out": True, "psnr": 20.0}
    lines = describe(RESULT | {"conditioned": conditioned})
    assert "closeness to the condition images: of seed 3 alone" in lines
    assert not any("alone" in line for line in describe(RESULT | {"seeds": [3], "conditioned": conditioned}))
