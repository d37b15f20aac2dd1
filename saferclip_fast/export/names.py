"""The formats that a model can be exported in."""

NAMES = ("open_clip", "huggingface", "peft", "onnx")
