"""Choose for a trained pipeline what its calls do by default: variances, timesteps, guidance, average of the weights.

    python training/calibrate.py runs/digits
    python training/calibrate.py a/stock-ddpm --dataset_name path/to/images --output_dir calibrated

PIPELINE is the folder of a run of training/train_ddpm.py or train_text_to_image.py, or another pipeline of images, also one of
diffusers. It is measured within --max_time: how well it predicts, for the analytic variance (arXiv 2201.06503); which timesteps
keep it near a fine trajectory of its own, and which cost few bits (arXiv 2106.03802); and by the Fréchet distance from images
which guidance, where, and which average of the weights of a run with --ema_snapshot_steps. What is chosen is saved with the
pipeline, and `calibration.json`, `calibration.png` and the card say what it gained, on images that nothing was chosen by. Images
of a test split are not looked at.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.calibrate import CalibrateConfig, main, parse, run


__all__ = ["CalibrateConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
