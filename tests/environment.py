"""What the suite takes from its environment: nothing but threads, kernels and devices, which a caller may choose.

`settle()` comes before torch and Hugging Face's libraries are imported, since they read most of this once. It holds for
the processes too that a test starts.
"""

import os
import time


# Seconds after which a process that a test starts is taken to hang: far more than it needs, since a machine that others
# use too may take ten times as long.
HUNG_AFTER = 900

# Of a user's shell, a job or a launcher. Each changes what is reached, computed or printed.
_CLEARED = (
    # Hugging Face: offline modes, caches, tokens, verbosity.
    ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "DATASETS_", "DIFFUSERS_", "TRANSFORMERS_")
    # accelerate's options, and the ranks that a launcher hands out.
    + ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "ROLE_", "GROUP_")
    + ("OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_")
    + ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # torch: logs, no compiling, and float32 products in bfloat16 or TF32.
    + ("TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "NVIDIA_TF32_OVERRIDE")
    + ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    # Proxies, through which loopback would be asked for.
    + ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
    # Bars, figures, texts.
    + ("TQDM_", "MPL", "LC_", "LANGUAGE", "PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUTF8")
)


def settle(hub_url: str, hf_home: str) -> None:
    """Clears what would change results, and sends whatever asks for the Hub to `hub_url`."""
    for name in [name for name in os.environ if name.startswith(_CLEARED)]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": hf_home,
        "HF_HUB_DISABLE_XET": "1",
        "LC_ALL": "C.UTF-8",
        "MATPLOTLIBRC": os.devnull,
        "MPLBACKEND": "agg",
        "NETRC": os.devnull,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else processes are started for it, each of which imports torch
        "TZ": "UTC",
    }
    # The suite is many small computations; more threads than cores make each of them slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(time, "tzset"):
        time.tzset()
    os.umask(0o022)


def settle_terminal() -> None:
    """Width and colours of what is printed; later than the rest, so that pytest's own report keeps the user's."""
    os.environ.pop("FORCE_COLOR", None)
    os.environ |= {"COLUMNS": "100", "LINES": "30", "PYTHON_COLORS": "0"}
