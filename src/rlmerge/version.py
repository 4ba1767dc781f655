"""The version of the package; plans carry it, and another version refuses to continue them."""

VERSION = "0.1.0"
