"""What a type checker is to refuse: a line whose error it did not find would have an unused comment, which is one too."""

import diffusers_ext
from diffusers_ext.hub.push import push_folder


diffusers_ext.example(3)  # type: ignore[arg-type]
other = diffusers_ext.exmaple("digits")  # type: ignore[attr-defined]
number: int = diffusers_ext.examples.example_names()  # type: ignore[assignment]
push_folder("runs/mine", "you/mine", privat=True)  # type: ignore[call-arg]
address: bytes = push_folder("runs/mine", "you/mine")  # type: ignore[assignment]
diffusers_ext.TrainConfig(lr=1e-4)  # type: ignore[call-arg]
