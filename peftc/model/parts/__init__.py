"""What a `PeftModel` is made of: adapters that come and go, what acts, prompts, rows of a batch, files, status.

`adapted` has what every such model is; `peftc.model.peft_model` gives it the API that users know.
"""
