"""A ControlNet and inpainting weights for the built-in model of Sfumato, as `built-in/edges` and `built-in/inpaint`."""
