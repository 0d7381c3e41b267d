# The compiled module has no types of its own; _core.py gives them.
from typing import Any

ffi: Any
lib: Any
