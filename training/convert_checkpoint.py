"""Make a pipeline of a checkpoint of OpenAI's guided-diffusion or improved-diffusion.

    python training/convert_checkpoint.py adm64.pt --output_dir runs/adm64 --image_size 64 --num_head_channels 64

FILE holds the weights of a U-Net, or their EMA. What a checkpoint does not say is given by the names that it has in those
projects. The pipeline is loaded as any other, and `--pretrained_pipeline` of the training scripts goes on with it.
"""

import openmp  # noqa: F401  before torch is loaded

from diffusers_ext.commands.convert_checkpoint import ConvertConfig, main, run


__all__ = ["ConvertConfig", "main", "run"]

if __name__ == "__main__":
    run()
