"""edgekws: an always-on keyword-spotting daemon that adapts on the device."""

__version__ = "0.2.0"
