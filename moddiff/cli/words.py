"""What do the words of a command line mean?  What the commands share."""

from pathlib import Path

MODEL = "a model of the package (tiny-t2v, tiny-fast, tiny-i2v), or a folder of downloaded weights"
CONFIG = "a config.json, where the sizes of one file cannot be told from its shapes"
SIZE = "HEIGHTxWIDTH in pixels, such as 480x832; with a star it is Wan's WIDTH*HEIGHT, such as 832*480"


def size_of(text):
    """ "480x832" and Wan's "832*480" -> (480, 832), None -> None"""
    if text is None:
        return None
    sides = text.lower().replace("*", "x").split("x")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"--size {text}; expected {SIZE}")
    first, second = map(int, sides)
    return (second, first) if "*" in text else (first, second)


def output_file(path: Path | None):
    """A file for figures, tried before the work that makes them."""
    from ..saving import writable

    # Called by typer while it reads the options; a command without --output brings None.
    return path and writable(path)


def scale_of(text):
    """ "5" -> 5.0; "3,4", for low and high noise, -> (3.0, 4.0); any other word is the name of a guide."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def steps_of(text):
    """ "20" -> 20; "1,0.757,0.522", noise levels, -> (1.0, 0.757, 0.522)"""
    try:
        return tuple(map(float, text.split(","))) if "," in text else int(text)
    except ValueError:
        raise ValueError(
            f"--steps {text}; expected a whole number, or noise levels such as 1,0.757,0.522"
        ) from None


def part_of(text):
    """ "text=my-encoder" -> ("text", "my-encoder")"""
    role, sign, name = text.partition("=")
    if not sign:
        raise ValueError(f"--use {text}; expected ROLE=NAME, such as text=my-encoder")
    return role, name


def plain(text):
    """Names out of files may hold codes that steer a terminal: those are shown and not obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
