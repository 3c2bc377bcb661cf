"""Distil a pipeline into a student that makes its images in few steps.

    python training/distill.py runs/digits --student_steps 2
    python training/distill.py runs/digits --method consistency --guidance_scale 1.5

PIPELINE is the folder of a run of training/train_ddpm.py or train_text_to_image.py, or another pipeline that makes images by
label, by text or of no condition and predicts v, also one of diffusers. Progressive distillation (arXiv 2202.00512) halves the
steps from --teacher_steps to --student_steps, each student learning from the one before, which is kept in OUTPUT_DIR/stages.
Consistency by easy tuning (arXiv 2406.14548) trains a model that predicts the end of its trajectory, for 1 step or some more.
With --guidance_scale the student makes the guided images at the price of unguided ones. The student is a pipeline like any
other, whose calls make the steps that it was distilled for.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.distill import DistillConfig, main, parse, run


__all__ = ["DistillConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
