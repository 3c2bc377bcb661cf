"""Make a pipeline of a checkpoint of guided-diffusion, improved-diffusion or denoising_diffusion_pytorch.

    python training/convert_checkpoint.py adm64.pt --output_dir runs/adm64 --image_size 64 --num_head_channels 64
    python training/convert_checkpoint.py results/model-1.pt --output_dir runs/mine --image_size 64

FILE holds the weights of a U-Net, or their EMA, or what the trainer of the last of these saves. What a checkpoint does not
say is given by the names that it has in those projects. The pipeline is loaded as any other, and `--pretrained_pipeline` of the training scripts goes on with it.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.convert_checkpoint import ConvertConfig, main, run


__all__ = ["ConvertConfig", "main", "run"]

if __name__ == "__main__":
    run()
