"""Self-contained HTML pages: one file each, pictures inside, readable without a network."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> bytes:
    """Fill in a template of `fracture/templates`, and return the page as UTF-8."""
    return _environment.get_template(template).render(**values).encode()


def picture(image: np.ndarray) -> str:
    """Return an image [H, W] or [H, W, 3] uint8 as the address of an `img`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return png(buffer.getvalue())


def png(data: bytes) -> str:
    """Return a PNG file as the address of an `img`."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
