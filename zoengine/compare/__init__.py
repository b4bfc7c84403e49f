"""All methods on the same job at equal forward passes: ``zoengine compare``. Needs the extra ``hf``."""
