"""The checks, by subject: each a function of one `Subject` that raises `PeftcError` when the method fails it."""
