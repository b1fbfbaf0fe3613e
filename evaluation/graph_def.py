"""The constants of a frozen TensorFlow graph (a GraphDef in a .pb file), without TensorFlow.

Read are float32 `Const` nodes. A protobuf message is a sequence of fields: a key, which is the field's number times 8
plus its wire type, and a value; a message within a message is a value of bytes. The fields' numbers are those of
TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto and tensor_shape.proto.
"""

import math
from pathlib import Path

import numpy as np

LARGEST_FILE = 2**29  # bytes; Inception's graph has about 100 MB
FLOAT = 1  # DataType.DT_FLOAT
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits per byte, the lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number has more than 64 bits")


def fields(data: memoryview):
    """The (number, value) of each field of a message: an int, or a memoryview of bytes.

    Raises ValueError or IndexError where data is no whole message.
    """
    place = 0
    while place < len(data):
        key, place = varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, place = varint(data, place)
        elif wire in (FIXED64, FIXED32, BYTES):
            length, place = varint(data, place) if wire == BYTES else (8 if wire == FIXED64 else 4, place)
            if length > len(data) - place:
                raise ValueError("a field is longer than its message")
            value, place = data[place : place + length], place + length
        else:
            raise ValueError(f"a field has the wire type {wire}")
        yield number, value


def last(data: memoryview, number: int):
    """The last value of a field, which is the one that counts, or None."""
    found = None
    for one, value in fields(data):
        if one == number:
            found = value
    return found


def tensor(data: memoryview) -> np.ndarray | None:
    """The array of a TensorProto of floats, None for another type."""
    dtype, shape, content, values = 0, [], None, []
    for number, value in fields(data):
        if number == 1:
            dtype = value
        elif number == 2:  # TensorShapeProto: its field 2 is a dimension, whose field 1 is the size
            shape = [last(dimension, 1) or 0 for one, dimension in fields(value) if one == 2]
        elif number == 4:
            content = value
        elif number == 5:  # packed, or one value at a time
            values.append(value)
    if dtype != FLOAT:
        return None
    array = np.frombuffer(content if content is not None else b"".join(values), "<f4")
    if array.size != math.prod(shape):
        raise ValueError(f"a tensor of shape {shape} has {array.size} values")
    return array.reshape(shape)


def read_constants(path) -> dict[str, np.ndarray]:
    """Name and array of each float32 constant of a graph, as views of the file's bytes.

    Raises ValueError, naming the file, where it is no graph.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes")
        constants = {}
        for number, node in fields(memoryview(path.read_bytes())):
            if number != 1:  # GraphDef.node
                continue
            name, op, value = "", b"", None
            for one, field in fields(node):
                if one == 1:
                    name = bytes(field).decode()
                elif one == 2:
                    op = bytes(field)
                elif one == 5 and bytes(last(field, 1) or b"") == b"value":  # an entry of NodeDef.attr
                    value = last(last(field, 2), 8)  # AttrValue.tensor
            if op == b"Const" and value is not None:
                array = tensor(value)
                if array is not None:
                    constants[name] = array
        if not constants:
            raise ValueError("it has no constants")
        return constants
    except (ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a TensorFlow graph: {error}") from None
