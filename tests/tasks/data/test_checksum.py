import hashlib

import numpy as np

from qprune.tasks.data.checksum import checksum


def test_checksum_is_sha256_of_type_shape_and_content() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert checksum([array]) == hashlib.sha256(b"|u1(2, 3)" + array.tobytes()).hexdigest()
    assert checksum([array]) == checksum([np.asfortranarray(array)])


def test_checksum_tells_shapes_types_and_orders_apart() -> None:
    a, b = np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)
    assert len({checksum(x) for x in ([a], [a.reshape(3, 2)], [a.view(np.int8)], [a, b], [b, a])}) == 5
