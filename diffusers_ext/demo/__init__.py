"""A page on which a pipeline is tried out: `studio` makes the images, `app` shows them by gradio, `space` exports it all."""
