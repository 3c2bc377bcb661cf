import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, _fetch_class_library_tuple

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.registration import BASE_CLASSES, register_with_diffusers, without_code
from environment import HUNG_AFTER
from tiny import assert_same_output, assert_same_pipeline, image_of, tiny_unet


PACKAGE = Path(diffusers_ext.__file__).parent
PUBLIC = {name: getattr(diffusers_ext, name) for name in diffusers_ext.__all__}
COMPONENTS = {
    name: value
    for name, value in PUBLIC.items()
    if isinstance(value, type) and issubclass(value, BASE_CLASSES) and value not in BASE_CLASSES
}


def stock_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(8, 1, 1, **blocks, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)


PIPELINES = {
    "ours": lambda: GuidedDiffusionPipeline(
        denoiser=tiny_unet(num_classes=3), scheduler=ExtDDIMScheduler(timestep_spacing="trailing")
    ),
    "ours, stock scheduler": lambda: GuidedDiffusionPipeline(
        denoiser=tiny_unet(), scheduler=DPMSolverMultistepScheduler()
    ),
    "ours, stock network": lambda: GuidedDiffusionPipeline(
        denoiser=stock_unet(), scheduler=ExtDDPMScheduler(timestep_spacing="trailing")
    ),
    "stock DDPM, our parts": lambda: DDPMPipeline(
        unet=tiny_unet(), scheduler=ExtDDPMScheduler(timestep_spacing="trailing")
    ),
    "stock DDIM, our network": lambda: DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()),
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    return PIPELINES[request.param]()


# Round trips.


@pytest.mark.product
@pytest.mark.parametrize("way", ["diffusers.DiffusionPipeline", "diffusers_ext.DiffusionPipeline", "its own class"])
def test_pipeline_loads_as_it_was_saved(pipeline, tmp_path, way):
    pipeline.save_pretrained(tmp_path)
    module = {"diffusers.DiffusionPipeline": diffusers, "diffusers_ext.DiffusionPipeline": diffusers_ext}.get(way)
    loaded = (module.DiffusionPipeline if module else type(pipeline)).from_pretrained(tmp_path)
    assert_same_pipeline(loaded, pipeline)


# A new process, in which libraries of the extras cannot be imported.
NEW_PROCESS = """
import json, sys
for name in ("matplotlib", "datasets", "sklearn", "pandas", "tensorboard"):
    sys.modules[name] = None  # importing it raises
from diffusers import AutoModel, DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin, ScoreSdeVeScheduler
from diffusers import CacheMixin, ModularPipelineBlocks
from diffusers.guiders import BaseGuidance
before = set(sys.modules)
import diffusers_ext
new = set(sys.modules) - before
packages = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names)
modules = {name for name in new if name.startswith(("diffusers.", "transformers.", "torch."))}

import diffusers
import numpy
import torch
images = []
for cls in (diffusers.DiffusionPipeline, diffusers_ext.DiffusionPipeline, diffusers_ext.GuidedDiffusionPipeline):
    pipeline = cls.from_pretrained(sys.argv[1] + "/pipeline")
    assert type(pipeline) is diffusers_ext.GuidedDiffusionPipeline
    generator = torch.Generator().manual_seed(0)
    images.append(pipeline(batch_size=1, num_inference_steps=4, generator=generator, output_type="np").images)
numpy.save(sys.argv[1] + "/images.npy", images)

import diffusers_ext.metrics
print(json.dumps({"packages": sorted(packages), "modules": sorted(modules), "metrics": True}))
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory):
    """What `NEW_PROCESS` says, the images that it made, and those that were to be made. One process for all that it tells."""
    folder, pipeline = tmp_path_factory.mktemp("new_process"), PIPELINES["ours"]()
    expected = image_of(pipeline)
    pipeline.save_pretrained(folder / "pipeline")
    command = [sys.executable, "-c", NEW_PROCESS, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_AFTER)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), np.load(folder / "images.npy"), expected


def test_pipeline_loads_in_a_new_process(new_process):
    _, images, expected = new_process
    for image in images:
        assert_same_output(image, expected)


@pytest.mark.parametrize("folder", ["runs/v1.5/step.400", "unet", "my pipeline", "diffusers_ext"])
def test_name_of_the_folder_does_not_matter(tmp_path, monkeypatch, folder):
    pipeline = PIPELINES["ours"]()
    pipeline.save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    for path in (folder, tmp_path / folder):
        assert_same_pipeline(diffusers.DiffusionPipeline.from_pretrained(path), pipeline)


def test_component_can_be_replaced_while_loading(tmp_path):
    PIPELINES["ours"]().save_pretrained(tmp_path)
    for scheduler in (DDIMScheduler(), ExtDDPMScheduler(timestep_spacing="trailing")):
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler)
        assert loaded.scheduler is scheduler


def test_auto_model_finds_our_network(tmp_path):
    PIPELINES["ours"]().save_pretrained(tmp_path)
    with_consent = {"subfolder": "denoiser", "trust_remote_code": True}  # which is not needed here
    for model in (
        diffusers.AutoModel.from_pretrained(str(tmp_path), **with_consent),
        diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="denoiser"),
        diffusers.AutoModel.from_pretrained(str(tmp_path / "denoiser")),
    ):
        assert type(model) is UNetModel


def test_consent_is_refused_for_what_is_not_ours_as_diffusers_does(tmp_path):
    stock_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not appear to have any custom code"):
        diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)


@pytest.mark.parametrize(
    ("module", "name"), [("__main__", "OwnScheduler"), ("_own_models", "OwnScheduler"), ("_own_models", "_Scheduler")]
)
def test_a_component_of_a_module_of_the_user_loads(tmp_path, monkeypatch, module, name):
    """As it does in a notebook or a script, whose module is `__main__`."""
    cls = type(name, (DDIMScheduler,), {"__module__": module})
    monkeypatch.setitem(sys.modules, "_own_models", ModuleType("_own_models"))
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    for base in (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
    ):  # for diffusers, which looks for them beside the class
        monkeypatch.setattr(sys.modules[module], base.__name__, base, raising=False)
    DDPMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"scheduler": [module, name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is cls


def test_a_pipeline_class_of_the_user_loads_under_a_private_name(tmp_path):
    cls = type("_Pipe", (DDPMPipeline,), {})
    cls(unet=tiny_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "_Pipe"
    assert type(cls.from_pretrained(tmp_path)) is cls


def test_files_of_code_may_have_names_that_no_class_has(tmp_path):
    """With consent alone, as every code."""
    DDPMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "my-pipe.py").write_text("from diffusers import DDPMPipeline\n\nclass MyP(DDPMPipeline):\n    pass\n")
    (tmp_path / "scheduler" / "my-own.py").write_text("from diffusers import DDIMScheduler as Own\n")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": ["my-pipe", "MyP"], "scheduler": ["my-own", "Own"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "MyP" and type(loaded.scheduler) is DDIMScheduler


def test_an_index_can_be_read_without_a_class(tmp_path):
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    assert diffusers.DiffusionPipeline.load_config(tmp_path) == {"unet": ["diffusers", "UNet2DModel"]}


# What is written.


def test_model_index_names_public_classes_alone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    name = type(pipeline).__name__  # with the file of its code, for those without this package
    assert index["_class_name"] == (["pipeline", name] if hasattr(diffusers_ext, name) else name)
    del index["_class_name"]
    named = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    assert set(named) == {name for name, component in pipeline.components.items() if component is not None}
    for name, (library, class_name) in named.items():
        module = {"diffusers": diffusers, "diffusers_ext": diffusers_ext}[library]
        assert getattr(module, class_name) is type(getattr(pipeline, name))
        assert library == type(getattr(pipeline, name)).__module__.split(".")[0]


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_is_recorded_under_its_public_name(name):
    """False for one in a folder that is named like one of `diffusers.pipelines`: it would never load again."""
    assert _fetch_class_library_tuple(COMPONENTS[name]) == ("diffusers_ext", name)
    assert getattr(diffusers, name) is COMPONENTS[name]


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda path: path.name)
def test_folder_is_a_package_of_a_free_name(folder):
    """One without `__init__.py` would be missing from an installed copy."""
    assert (folder / "__init__.py").is_file()
    assert not hasattr(diffusers.pipelines, folder.name)


# The registration.


def test_base_classes_stand_beside_the_components():
    assert set(LOADABLE_CLASSES["diffusers_ext"]) <= set(LOADABLE_CLASSES["diffusers"])
    for name, methods in LOADABLE_CLASSES["diffusers_ext"].items():
        assert getattr(diffusers_ext, name) is getattr(diffusers.guiders if "Guid" in name else diffusers, name)
        assert methods == LOADABLE_CLASSES["diffusers"][name]


def test_config_goes_to_a_stock_scheduler_and_back_without_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    ours = ExtDDIMScheduler(beta_start=2e-4)
    stock = DDIMScheduler.from_config(ours.config)
    back = ExtDDIMScheduler.from_config(stock.config)
    assert {**back.config, "_use_default_values": 0} == {**ours.config, "_use_default_values": 0}
    assert caplog.records == []


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"auto_map": []},
        {"auto_map": {"AutoModel": ["diffusers_ext.Component"]}},
        {"auto_map": {"AutoModel": "theirs.Component"}, "_class_name": ["pipeline", "GuidedDiffusionPipeline"]},
        {"auto_map": {"AutoModel": "diffusers_ext.Component"}, "_class_name": []},
        {"auto_map": {"AutoModel": "diffusers_ext.Component"}, "_class_name": ["pipeline", "OfALaterVersion"]},
        {"auto_map": {"AutoModel": "diffusers_ext.Component"}, "_class_name": ["pipeline", "DDPMPipeline"]},
        {
            "denoiser": ["diffusers_ext"],
            "vae": ["diffusers_ext", None],
            "scheduler": ["diffusers_ext", "OfALaterVersion"],
        },
    ],
    ids=str,
)
def test_configs_of_others_are_read_as_they_are(config):
    assert without_code(config) == config


def test_names_of_diffusers_keep_their_meaning(caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers_ext"), "propagate", True)
    stock = diffusers.UNet2DModel
    impostor = type("UNet2DModel", (UNetModel,), {"__module__": "diffusers_ext.models.impostor"})
    register_with_diffusers({"UNet2DModel": impostor})
    assert diffusers.UNet2DModel is stock
    assert "has a UNet2DModel of its own" in caplog.text


def test_registering_again_changes_nothing():
    before = {name: getattr(diffusers, name) for name in COMPONENTS}
    register_with_diffusers(vars(diffusers_ext))
    assert {name: getattr(diffusers, name) for name in COMPONENTS} == before


# Importing.


def test_import_brings_in_nothing_but_what_diffusers_does(new_process):
    found, _, _ = new_process
    assert found["packages"] == ["diffusers_ext"] and found["modules"] == []


def test_importing_sampling_and_the_metrics_need_none_of_the_extras(new_process):
    """The metrics are for other projects' training loops too."""
    assert new_process[0]["metrics"]
