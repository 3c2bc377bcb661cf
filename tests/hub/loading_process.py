"""Loads a pipeline in every way, with this package imported, or without it in a process of its own:

    python loading_process.py PARTS HUB_REPO FOLDER [HUB_REPO FOLDER ...]

Prints a line of JSON, what `load_all` returns; and loads what there is in the folder PARTS, see `load_parts`.
"""

import json
import os
import sys


def load_all(way, repos):
    """For each way of loading by its name, what was loaded and how far it is from `FOLDER/expected.*`.

    The last pipeline is saved to `FOLDER-again`.
    """
    from diffusers import AutoModel, DiffusionPipeline, ModularPipeline

    consent = {} if way == "package" else {"trust_remote_code": True}
    found = {}
    for repo, folder in repos:
        variants = [None] if "sharded" in folder else [None, "bf16"]
        for place in (folder, repo):
            where = f"{os.path.basename(folder)} {'folder' if place == folder else 'Hub'}"
            for variant in variants:
                kwargs = consent | ({} if variant is None else {"variant": variant, "torch_dtype": dtype_of(variant)})
                pipe = DiffusionPipeline.from_pretrained(place, **kwargs)
                found[f"{where} {variant} pipeline"] = described(pipe) | weights(pipe.denoiser, folder, variant)
                if variant is None:
                    found[f"{where} {variant} pipeline"] |= {"image": image_error(pipe, folder)}
                    found[f"{where} {variant} stock pipeline"] = {"image": image_error(stock(pipe), folder)}
                    found[f"{where} {variant} vae"] = described(
                        AutoModel.from_pretrained(place, subfolder="vae", **kwargs)
                    )
                model = AutoModel.from_pretrained(place, subfolder="denoiser", **kwargs)
                found[f"{where} {variant} model"] = described(model) | weights(model, folder, variant)
            scheduler = AutoModel.from_pretrained(place, subfolder="scheduler", **consent)
            same = {k: v for k, v in scheduler.config.items() if k[0] != "_"} == {
                k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"
            }
            found[f"{where} scheduler"] = described(scheduler) | {"same config": same}
            found[f"{where} without consent"] = without_consent(place)
            modular = ModularPipeline.from_pretrained(place, **consent)
            modular.load_components()
            found[f"{where} modular pipeline"] = described(modular.blocks) | {"image": image_error(modular, folder)}
    pipe.save_pretrained(f"{folder}-again")
    return found


def load_parts(folder):
    """Of a pipeline of diffusers, a model by itself, and a pipeline of texts, of which an image is left."""
    import numpy
    import torch
    from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder + "/stock", trust_remote_code=True)
    assert type(pipe) is DDPMPipeline and type(pipe.unet).__module__.startswith("diffusers_ext_")
    pipe.unet.save_pretrained(folder + "/stock/again")

    model = AutoModel.from_pretrained("alice/unet", trust_remote_code=True)
    assert type(model).__module__.startswith("diffusers_ext_")
    model.save_pretrained(folder + "/again")

    pipe = DiffusionPipeline.from_pretrained(folder + "/texts", trust_remote_code=True)
    images = pipe("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    numpy.save(folder + "/images.npy", images)


def without_consent(place):
    from diffusers import DiffusionPipeline

    try:
        return described(DiffusionPipeline.from_pretrained(place))
    except ValueError as error:
        return {"refused": str(error)}


def dtype_of(variant):
    import torch

    return {None: torch.float32, "bf16": torch.bfloat16}[variant]


def described(loaded):
    return {"class": type(loaded).__name__, "package": type(loaded).__module__.partition(".")[0]}


def weights(model, folder, variant):
    """The number of tensors that differ from those of the variant, in a bit or in their type."""
    from safetensors.torch import load_file

    expected, got = load_file(f"{folder}/expected.safetensors"), model.state_dict()
    assert got.keys() == expected.keys()
    dtype = dtype_of(variant)
    wrong = [n for n in got if got[n].dtype != dtype or not (got[n] == expected[n].to(dtype)).all()]
    return {"wrong tensors": len(wrong)}


def stock(pipe):
    """The weights in a pipeline of diffusers itself."""
    from diffusers import LDMPipeline

    return LDMPipeline(vqvae=pipe.vae, unet=pipe.denoiser, scheduler=pipe.scheduler)


def image_error(pipe, folder):
    import numpy as np
    import torch

    pipe.set_progress_bar_config(disable=True)
    options = {"output": "images"} if hasattr(pipe, "blocks") else {}
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=1, num_inference_steps=4, generator=generator, output_type="np", **options)
    images = images if options else images.images
    return float(abs(images - np.load(f"{folder}/expected.npy")).max())


if __name__ == "__main__":
    sys.modules["diffusers_ext"] = None  # importing it raises, as where it is not installed
    parts, *names = sys.argv[1:]
    load_parts(parts)
    print(json.dumps(load_all("code", [*zip(names[::2], names[1::2], strict=True)])))
